"""The waist: linear head -> per-token log-probs. logp.py is its face, plan.py chooses, passes.py runs."""

from .logits import logp_from_logits, stats_from_logits
from .logp import TokenStats, linear_logp, token_stats
from .workspace import release_workspace

__all__ = [
    "TokenStats",
    "linear_logp",
    "logp_from_logits",
    "release_workspace",
    "stats_from_logits",
    "token_stats",
]
