"""The losses, one definition each. `Loss` says what a loss is; the files hold one family each."""

from .advantages import combine_rewards, gae, group_advantages, value_loss, whiten
from .base import Loss
from .batchwise import AOT, BetaDPO
from .clipped import GRPO, GSPO, LUSPO, PPO, RLOO, HybridPolicy
from .likelihood import SFT
from .preference import (
    CPO,
    DPO,
    DPOP,
    EXO,
    IPO,
    MADPO,
    NCA,
    ORPO,
    APODown,
    APOZero,
    BCOPair,
    DiscoPOP,
    Hinge,
    SigmoidNorm,
    SimPO,
    SPPOHard,
)
from .sums import Sum
from .unpaired import BCO, KTO, APOZeroUnpaired, kto_kl
from .weighted import CISPO, GMPO, GRAO, REINFORCE, SAPO, VESPO

__all__ = [
    "AOT", "BCO", "CISPO", "CPO", "DPO", "DPOP", "EXO", "GMPO", "GRAO", "GRPO", "GSPO", "IPO", "KTO", "LUSPO",
    "MADPO", "NCA", "ORPO", "PPO", "REINFORCE", "RLOO", "SAPO", "SFT", "VESPO", "APODown", "APOZero",
    "APOZeroUnpaired", "BCOPair", "BetaDPO", "DiscoPOP", "Hinge", "HybridPolicy", "Loss", "SPPOHard",
    "SigmoidNorm", "SimPO", "Sum", "combine_rewards", "gae", "group_advantages", "kto_kl", "value_loss",
    "whiten",
]  # fmt: skip
