"""The steps as CUDA C++ kernels of csrc/, compiled when the package was installed."""

from __future__ import annotations

import importlib
import importlib.util
import re
from types import ModuleType

import torch

OLDEST = 8  # compute capability
NAME = "fused_align._cuda"
INTERFACE = 1  # of the launch functions, as csrc/launches.h has it: one more for every change of them
OLD = "its module was built from other sources (install the package again)"


def _built() -> ModuleType | str:
    if importlib.util.find_spec(NAME) is None:
        return (
            "its module was not built: that takes nvcc when the package is installed (FUSED_ALIGN_CUDA=1 pip "
            "install . says what is missing)"
        )
    try:
        found = importlib.import_module(NAME)
        unserved = found.unserved() if found.interface == INTERFACE else OLD
    except (ImportError, AttributeError, RuntimeError) as error:  # built for another system, say; or a stub
        return f"its module is there and cannot be used: {error}"
    return found if unserved is None else unserved


#: the compiled module, or a sentence why there is none. It has a launch function for every kernel; `device`,
#: the kind of device whose tensors it takes; `archs`, what it was compiled for: "80 90a 100+PTX". (It is
#: loaded here, since torch.compile could not follow an import.)
module = _built()


def why_not(device: torch.device) -> str | None:
    """None where the module can run, else the reason: it was built, for this GPU."""
    if isinstance(module, str):
        return module
    if device.type != module.device:
        return f"its kernels need tensors on {module.device}, and these are on {device}"
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return "its kernels need an NVIDIA GPU"
    found = torch.cuda.get_device_properties(device)  # (a constant to torch.compile)
    if found.major < OLDEST:
        return f"it needs compute capability {OLDEST}.0; this GPU has {found.major}.{found.minor}"
    if not _has_code(module.archs, found.major, found.minor):
        return (
            f"its module was built for {module.archs}, and this GPU is {found.major}{found.minor} (install "
            f"with FUSED_ALIGN_CUDA_ARCHS={found.major}{found.minor})"
        )
    return None


def _has_code(archs: str, major: int, minor: int) -> bool:
    """Whether code for some of `archs` runs on a GPU of this compute capability.

    That of 8.0 runs on 8.6 too, that of 10.0f on 10.3, that of 9.0a on 9.0 alone; PTX of 8.0 on all later.
    """
    for arch in archs.split():
        number, kind, ptx = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", arch).groups()  # type: ignore[union-attr]
        own = divmod(int(number), 10)
        if own == (major, minor) or kind != "a" and own[0] == major and own[1] <= minor:
            return True
        if ptx and not kind and own <= (major, minor):
            return True
    return False
