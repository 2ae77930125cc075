"""Everything imports, and the core does so without anything but torch."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]
TRAIN = ("transformers", "accelerate", "peft", "datasets", "tqdm", "yaml", "gguf")
DEMO = ("matplotlib", "rich", "vaderSentiment")
OPTIONAL = ("triton", "numpy", *TRAIN, *DEMO)
CORE = ("fused_align", "fused_align.losses", "fused_align.linear", "fused_align.backends", "fused_align.env")


def modules() -> list[str]:
    """Dotted names of all files of the package."""
    files = sorted((ROOT / "fused_align").rglob("*.py"))
    names = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


def python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)


def test_every_module_imports() -> None:
    pytest.importorskip("transformers")
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\nprint('imported')"
    done = python(code, *modules())
    assert (done.returncode, done.stdout.strip()) == (0, "imported"), done.stderr


def test_extras_hold_what_their_code_imports() -> None:
    tomllib = pytest.importorskip("tomllib")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {extra: {re.split(r"[^\w-]", wanted)[0] for wanted in extras[extra]} for extra in extras}
    assert {"PyYAML" if name == "yaml" else name for name in TRAIN} == named["train"]
    assert {*DEMO, "fused-align"} == named["demo"]


def test_the_trainer_imports_without_what_the_demo_needs() -> None:
    pytest.importorskip("transformers")
    code = "import sys\nsys.modules.update(dict.fromkeys(sys.argv[1:]))\nimport fused_align.train.cli"
    done = python(code, *DEMO)
    assert done.returncode == 0, done.stderr


def test_core_imports_with_torch_alone() -> None:
    # a None in sys.modules makes `import` fail as it does where the package is not installed
    code = (
        "import importlib, json, sys\n"
        "optional, core = map(json.loads, sys.argv[1:])\n"
        "sys.modules.update(dict.fromkeys(optional))\n"
        "for name in core: importlib.import_module(name)\n"
        "import torch, fused_align as fa\n"
        "hidden, weight = torch.ones(2, 3, requires_grad=True), torch.ones(5, 3)\n"
        "logp = fa.linear_logp(hidden, weight, torch.tensor([1, 4]))\n"
        "logp.sum().backward()\n"
        "print(round(logp.sum().item(), 4), hidden.grad.abs().max().item() < 1e-6)\n"
    )
    # torch itself warns where numpy is missing
    done = python(code, json.dumps(OPTIONAL), json.dumps(CORE), PYTHONWARNINGS="ignore")
    assert done.stdout.strip() == "-3.2189 True", done.stderr  # 2 log(1/5)


def test_import_is_light() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"  # torch has its own ideas of what to import
        "import fused_align\n"
        "print(sorted((set(sys.modules) - before) & set(sys.argv[1:])))\n"
    )
    done = python(code, "triton", *TRAIN, *DEMO)
    assert done.stdout.strip() == "[]", done.stderr


def test_every_folder_is_packaged() -> None:
    folders = {file.parent for file in (ROOT / "fused_align").rglob("*.py")}
    expected = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(find_packages(str(ROOT), include=["fused_align*"])) == expected
    assert (ROOT / "fused_align" / "py.typed").is_file()
