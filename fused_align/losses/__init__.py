"""The losses, one definition each. `Loss` says what a loss is; the files hold one family each."""

from .base import Loss, Objective
from .likelihood import SFT
from .policy import GRPO, PPO
from .preference import DPO, IPO, KTO, kto_kl

__all__ = ["DPO", "GRPO", "IPO", "KTO", "PPO", "SFT", "Loss", "Objective", "kto_kl"]
