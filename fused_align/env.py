"""What is installed and usable here, and why something is not: `python -m fused_align.env`.

Meant for bug reports. Versions are read from the packages' metadata: none but torch is imported.
"""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from fused_align import __version__, backends

# What a result or a failure may depend on, by the part of the package that uses it.
PACKAGES = {
    "core": ("triton", "numpy"),
    "train": ("transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "gguf"),
    "bench": ("trl", "liger-kernel", "cut-cross-entropy"),
}


def version(package: str) -> str:
    """The installed version of a distribution, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def devices() -> list[str]:
    """One line for the CPU and one for each GPU that torch can use."""
    lines = [f"cpu, {torch.get_num_threads()} threads, {platform.machine()}"]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        found = torch.cuda.get_device_properties(index)
        target = f"sm_{found.major}{found.minor}" if torch.version.hip is None else found.gcnArchName
        lines.append(f"cuda:{index} {found.name}, {target}, {found.total_memory / 2**30:.0f} GiB")
    return lines


def report() -> str:
    """The whole report, as text."""
    runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else ""
    runtime = runtime or (f"ROCm {torch.version.hip}" if torch.version.hip else "built without CUDA")
    rows = [
        ("fused_align", __version__),
        ("python", f"{platform.python_version()}, {platform.system()} {platform.release()}"),
        ("torch", f"{torch.__version__}, {runtime}"),
    ]
    for part, packages in PACKAGES.items():
        rows += [(f"{package} ({part})", version(package)) for package in packages]
    rows += [("device", line) for line in devices()]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for name, why_not in backends.table(device):
        usable = f"usable on {device}" if why_not is None else f"not usable: {why_not}"
        rows.append((f"backend {name}", usable))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def main() -> None:
    print(report())


if __name__ == "__main__":
    main()
