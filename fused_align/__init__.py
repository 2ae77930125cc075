"""fused_align: alignment losses from hidden states and the lm_head weight, without full logits."""

from . import losses
from .api import AlignOutput, align_loss
from .batch import Batch
from .humanline import Humanline, HumanlineSampling, SyncSchedule
from .linear import (
    TokenStats,
    linear_logp,
    logp_from_logits,
    release_workspace,
    stats_from_logits,
    token_stats,
)
from .losses import *  # noqa: F403  the losses and their helpers, as losses.__all__ names them
from .planning import explain

__version__ = "0.1.0"

__all__ = [
    "AlignOutput",
    "Batch",
    "Humanline",
    "HumanlineSampling",
    "SyncSchedule",
    "TokenStats",
    "align_loss",
    "explain",
    "linear_logp",
    "logp_from_logits",
    "release_workspace",
    "stats_from_logits",
    "token_stats",
]
__all__ += losses.__all__
