"""python -m fused_align.env: the report that a bug report carries."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from fused_align import backends, env


def lines() -> dict[str, str]:
    return dict(line.split("  ", 1) for line in env.report().splitlines())


def test_report_names_versions_device_and_backends() -> None:
    shown = {name.strip(): value.strip() for name, value in lines().items()}
    assert shown["torch"].startswith(str(torch.__version__))
    assert shown["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert "device" in shown
    listed = {f"backend {name}" for name, _ in backends.table()}
    assert {name for name in shown if name.startswith("backend ")} == listed
    assert shown["backend torch"].startswith("usable on ")


def test_reason_of_an_unusable_backend_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "table", lambda device: [("triton", "triton is not installed")])
    assert "backend triton" in env.report()
    assert env.report().endswith("not usable: triton is not installed")


def test_missing_package_is_said() -> None:
    assert env.version("fused-align-no-such-package") == "not installed"
    assert env.version("pytest") == pytest.__version__


def test_command_imports_nothing_heavy() -> None:
    code = (
        "import runpy, sys, json\n"
        "runpy.run_module('fused_align.env', run_name='__main__')\n"
        "print(json.dumps([n for n in ('transformers', 'datasets', 'peft') if n in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fused_align")
    assert json.loads(done.stdout.splitlines()[-1]) == []
