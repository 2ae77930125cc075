"""fused-align train CONFIG.yaml [--field value ...]: align a model as a YAML file says.

The file holds fields of ModelConfig, DataConfig and AlignConfig (which has all of Hugging Face's
TrainingArguments), in any order. On the command line each can be set again: --learning_rate 1e-5,
--humanline "[-1.5, 1.5]", --loss_args.beta 0.2, --bf16. What is wrong with the settings is said in a
sentence; --log_level debug shows where.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from datasets.exceptions import DatasetsError
from transformers import HfArgumentParser
from transformers.trainer_utils import get_last_checkpoint

from .config import SWITCHES, AlignConfig, DataConfig, ModelConfig, near, typed
from .data import load_data
from .model import load_model
from .trainer import AlignTrainer

SECTIONS = (ModelConfig, DataConfig, AlignConfig)
FLOAT = "tag:yaml.org,2002:float"
SWITCHED_TOO = ("humanline", "resume_from_checkpoint")  # true, false, or something else

# What wrong settings raise before training begins: ours, and those of transformers, peft and datasets.
USER_ERRORS = (ValueError, TypeError, NotImplementedError, ImportError, OSError, DatasetsError)


class ConfigError(ValueError):
    """A setting that does not exist or cannot be read."""


class _Loader(yaml.SafeLoader):
    """YAML as version 1.2 has it and most people read it: 1e-5 is a number; no, off, yes, on are words.

    PyYAML's 1.1 makes a string of 1e-5, and False of save_strategy: no.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in ("tag:yaml.org,2002:bool", FLOAT)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    FLOAT,
    re.compile(
        r"^[-+]?(?:(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+|\d+\.\d*|\.\d+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 2 for settings that do not fit."""
    parser = argparse.ArgumentParser(prog="fused-align", description=__doc__, formatter_class=_Help)
    commands = parser.add_subparsers(dest="command", required=True)
    help_train = "train (and evaluate, if there is held-out data) as a YAML file says"
    train_parser = commands.add_parser(
        "train", help=help_train, description=help_train, epilog=_fields(), formatter_class=_Help
    )
    train_parser.add_argument("config", type=Path, help="the YAML file")
    groups = _groups(sys.argv[1:] if argv is None else argv)
    groups.sort(key=lambda group: group[0].startswith("-"))  # the file may stand behind the settings
    known, overrides = parser.parse_known_args([word for group in groups for word in group])
    debug = False
    try:
        settings = parse(read(known.config), overrides)
        debug = settings[-1].log_level == "debug"
        trainer = set_up(*settings)
    except USER_ERRORS as error:
        if debug:
            raise
        print(f"fused-align: {_sentence(error)}", file=sys.stderr)
        return 2
    finish(trainer)
    return 0


def train(model_config: ModelConfig, data_config: DataConfig, args: AlignConfig) -> dict[str, float]:
    """Loads, trains (or resumes), saves the model to output_dir, and returns the final metrics."""
    return finish(set_up(model_config, data_config, args))


def set_up(model_config: ModelConfig, data_config: DataConfig, args: AlignConfig) -> AlignTrainer:
    """The trainer, with its data and its model: what can be wrong with the settings shows here."""
    _check_checkpoint(args)
    _check_output(model_config.model_name_or_path, args)
    rows, held_out = load_data(data_config)
    model, tokenizer = load_model(
        model_config.model_name_or_path,
        dtype=model_config.dtype,
        revision=model_config.model_revision,
        attn_implementation=model_config.attn_implementation,
        trust_remote_code=model_config.trust_remote_code,
    )
    return AlignTrainer(model, args, rows, held_out, tokenizer, peft_config=model_config.peft_config())


def finish(trainer: AlignTrainer) -> dict[str, float]:
    """Trains, saves and, where there is a held-out set, evaluates."""
    metrics = trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint).metrics
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", metrics)
    if trainer.held_out:
        found = trainer.evaluate()
        trainer.log_metrics("eval", found)
        trainer.save_metrics("eval", found)
        metrics = metrics | found
    return metrics


def _check_checkpoint(args: AlignConfig) -> None:
    wanted, folder = args.resume_from_checkpoint, str(args.output_dir)
    if wanted is True and not (Path(folder).is_dir() and get_last_checkpoint(folder)):
        raise ConfigError(f"resume_from_checkpoint is true, and {folder} holds no checkpoint to go on from.")
    if wanted and wanted is not True and not Path(wanted).is_dir():
        raise ConfigError(
            f"resume_from_checkpoint must be a checkpoint's folder, or true for the last one in output_dir; "
            f"there is no folder {wanted}."
        )


def _check_output(name_or_path: str, args: AlignConfig) -> None:
    source, output = Path(name_or_path).resolve(), Path(str(args.output_dir)).resolve()
    if (source / "adapter_config.json").is_file() and source.is_relative_to(output):
        raise ConfigError(
            f"model_name_or_path is an adapter in output_dir ({output}), and training on from it would write "
            "over it, or beside it what can't be told from it. Set another --output_dir."
        )


def _sentence(error: BaseException) -> str:
    """The error's text, and its cause's where that is a library's: datasets says there what was wrong."""
    cause = error.__cause__ if isinstance(error, DatasetsError) else None
    return f"{error}" if cause is None else f"{error} {cause}"


def read(path: Path) -> dict[str, Any]:
    """The YAML file as a dict."""
    if not path.is_file():
        raise ConfigError(
            f"there is no file {path}. Name the YAML file first: fused-align train CONFIG.yaml --field value."
        )
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  (a SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML ({error}). Correct the line that it names.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold fields and values (name: value); got {type(values).__name__}.")
    return values


def parse(values: dict[str, Any], overrides: list[str]) -> tuple[ModelConfig, DataConfig, AlignConfig]:
    """The three configs from a file's values and `--field value` arguments. Raises ValueError."""
    values = {**values, **{key: dict(value) for key, value in values.items() if isinstance(value, dict)}}
    for name, value in _overrides(overrides):
        outer, _, inner = name.partition(".")
        if not inner:
            values[name] = value
            continue
        if not isinstance(values.get(outer) or {}, dict):
            raise ConfigError(
                f"--{name}: {outer} is {values[outer]!r}, not a mapping that {inner} could be set in."
            )
        values[outer] = {**(values.get(outer) or {}), inner: value}
    known = {field.name for section in SECTIONS for field in dataclasses.fields(section) if field.init}
    for name in values:
        if name not in known:
            raise ConfigError(
                f"there is no setting {name!r}{near(name, known)} `fused-align train --help` lists them."
            )
    for required in ("model_name_or_path", "dataset"):
        if not values.get(required):
            raise ConfigError(f"{required} is not set; name it in the file or with --{required}.")
    sections: Any = HfArgumentParser(list(SECTIONS)).parse_dict(_typed(values))
    return sections


def _typed(values: dict[str, Any]) -> dict[str, Any]:
    """Each value as its field's type has it; HfArgumentParser takes "no" for true and "high" for a rate."""
    hints = {name: hint for section in SECTIONS for name, hint in get_type_hints(section).items()}
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in SWITCHED_TOO:
            found[name] = SWITCHES.get(value.lower(), value) if isinstance(value, str) else value
        else:
            found[name] = typed(name, value, hints[name])
    return found


def _groups(words: list[str]) -> list[list[str]]:
    """Each --field with the value that follows it, and each word that belongs to none."""
    groups: list[list[str]] = []
    for word in words:
        last = groups[-1] if groups else [""]
        if last[0].startswith("--") and "=" not in last[0] and len(last) == 1 and not word.startswith("--"):
            last.append(word)
        else:
            groups.append([word])
    return groups


def _overrides(words: list[str]) -> list[tuple[str, Any]]:
    """--name value, --name=value, and --name alone for true, as pairs; values are YAML."""
    found: list[tuple[str, Any]] = []
    for word, *value in _groups(words):
        if not word.startswith("--"):
            raise ConfigError(
                f"expected --field value; got {word!r}. Quote values with spaces: --humanline '[-1.5, 1.5]'."
            )
        name, equals, text = word[2:].partition("=")
        text = text if equals else (*value, "true")[0]
        try:
            found.append((name.replace("-", "_"), yaml.load(text, _Loader)))  # noqa: S506  (a SafeLoader)
        except yaml.YAMLError as error:
            raise ConfigError(f"--{name}: {text!r} is not a YAML value ({error}).") from error
    return found


def _fields() -> str:
    """All settings with their help, for --help; TrainingArguments' own are named only."""
    lines: list[str] = []
    inherited = {field.name for field in dataclasses.fields(AlignConfig.__mro__[1])}
    for section in SECTIONS:
        lines.append(f"{section.__name__}:")
        for field in dataclasses.fields(section):
            if section is not AlignConfig or field.name not in inherited:
                lines.append(f"  --{field.name}  {field.metadata.get('help', '')} [{field.default}]")
    lines.append("Of transformers.TrainingArguments: " + ", ".join(sorted(inherited)))
    return "\n".join(lines)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Keeps line breaks."""


if __name__ == "__main__":
    sys.exit(main())
