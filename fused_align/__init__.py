"""fused_align: alignment losses from hidden states and the lm_head weight, without full logits."""

from .api import AlignOutput, align_loss
from .batch import Batch
from .humanline import Humanline, SyncSchedule
from .linear import TokenStats, linear_logp, logp_from_logits, release_workspace, token_stats
from .losses import DPO, GRPO, IPO, KTO, PPO, SFT, Loss, kto_kl
from .planning import explain

__version__ = "0.1.0"

__all__ = [
    "DPO",
    "GRPO",
    "IPO",
    "KTO",
    "PPO",
    "SFT",
    "AlignOutput",
    "Batch",
    "Humanline",
    "Loss",
    "SyncSchedule",
    "TokenStats",
    "align_loss",
    "explain",
    "kto_kl",
    "linear_logp",
    "logp_from_logits",
    "release_workspace",
    "token_stats",
]
