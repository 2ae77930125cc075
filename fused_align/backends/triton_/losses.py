"""How the loss kernels are launched; `kernel_losses` has which, and their arguments."""

from __future__ import annotations

from typing import Any

import torch
import triton

from ..kernel_losses import LossLaunch
from . import on_device
from .policy_kernel import policy_loss
from .preference_kernels import judged_loss, preference_loss

KERNELS = {"policy_loss": policy_loss, "preference_loss": preference_loss, "judged_loss": judged_loss}
BLOCK = 512  # tokens of a step: 4 for each thread of 4 warps, whose sums in float64 take up to 220 registers
OPTIONS = {"num_warps": 4}
if torch.version.hip is None:
    # without it ptxas spills some registers to make room for more warps than there are
    OPTIONS["maxnreg"] = 255


def loss(launch: LossLaunch, device: torch.device) -> None:
    with on_device(device):
        KERNELS[launch.kernel][(launch.programs,)](**launch.arguments, **sizes(launch), **OPTIONS)


def sizes(launch: LossLaunch) -> dict[str, Any]:
    return {"ROWS": triton.next_power_of_2(launch.arguments["K"]), "BLOCK": BLOCK}
