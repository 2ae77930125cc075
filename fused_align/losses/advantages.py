"""What stands between rewards and a policy loss: advantages, and the loss of PPO's value head.

    rewards [S, K] --combine_rewards--> reward [S] --group_advantages--> batch.advantage [S]      GRPO, RLOO
    reward, value [S, T] --gae--> advantage, returns [S, T] --whiten--> batch.advantage [S, T]    PPO
    value, returns [S, T] --value_loss--> scalar

S sequences of T tokens, K rewards. Statistics are float64, results have the dtype of what was given, and
nothing waits for the device. All but value_loss is detached.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import added_at, numbered
from .state import all_reduced


@torch.no_grad()
def group_advantages(
    reward: Tensor,  # [S]
    group: Tensor | None = None,  # [S] int64
    *,
    scale: str = "group",
    unbiased: bool = True,
    eps: float = 1e-4,
    baseline: str = "mean",
) -> Tensor:  # [S]
    """(R - baseline) / (std + eps): how a completion compares with the others of its prompt.

    A group without spread, of one too, gets exact zeros. A reward that is NaN is unknown: it gets 0, and the
    statistics are those of the others.

    Args:
        group: a number that the completions of a prompt share, any int64; None: all are one group.
        scale: the std of the "group", or of all rewards of this call ("batch"); "none": no division.
        unbiased: n - 1 in the variance (Bessel); False: n, the population's.
        baseline: the group's "mean", or the mean of the others, "leave_one_out" (RLOO; with scale="none").

    Raises:
        ValueError: an unknown scale or baseline, a negative eps, or a tensor of another shape or dtype.

    TRL's scale_rewards and defaults. verl has eps 1e-6 and gives a group of one its reward; both leave what
    rounding makes of a group without spread. Sources: GRPO arXiv 2402.03300 section 4.1.2; std of the batch
    arXiv 2508.08221; no std arXiv 2503.20783; leave-one-out arXiv 2402.14740.

    >>> group_advantages(torch.tensor([1.0, 2.0, 0.1, 3.0, 0.1]), torch.tensor([7, 7, -1, 7, -1]))
    tensor([-0.9999,  0.0000,  0.0000,  0.9999,  0.0000])
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f'group_advantages: scale must be "group", "batch" or "none"; got {scale!r}.')
    if baseline not in ("mean", "leave_one_out"):
        raise ValueError(f'group_advantages: baseline must be "mean" or "leave_one_out"; got {baseline!r}.')
    if not eps >= 0:
        raise ValueError(f"group_advantages: eps is added to a std and must be 0 or more; got {eps}.")
    group = torch.zeros_like(reward, dtype=torch.int64) if group is None else group
    vector = reward.dim() == 1 and reward.is_floating_point()
    if not vector or group.shape != reward.shape or group.dtype != torch.int64:
        raise ValueError(
            "group_advantages: reward must be [S] of a floating-point dtype, and group [S] int64; got "
            f"{reward.dtype} {list(reward.shape)} and {group.dtype} {list(group.shape)}. Several rewards of "
            "a sequence go through combine_rewards first."
        )
    advantage, std, size = _centred(reward.double(), numbered(group), unbiased)
    if scale == "batch":
        _, std, _ = _centred(reward.double(), torch.zeros_like(group), unbiased)
    if baseline == "leave_one_out":  # R_i - mean of the others = n / (n - 1) (R_i - mean of all)
        advantage = advantage * size / (size - 1).clamp(min=1)
    if scale != "none":  # 0 stays 0, with eps = 0 too
        advantage = torch.where(advantage == 0, 0.0, advantage / (std + eps))
    return advantage.to(reward.dtype)


@torch.no_grad()
def combine_rewards(
    rewards: Tensor,  # [S, K]
    weights: Tensor | Sequence[float] | None = None,  # [K]
    *,
    group: Tensor | None = None,  # [S] int64
    normalize: bool = False,
) -> Tensor:  # [S]
    """sum_k w_k R_k; a NaN says that a reward does not apply to a sequence. NaN where none applies.

    weights None: 1 each. normalize: each reward first gets mean 0 and std 1 in its group (None: the batch),
    so that none drowns another. GDPO, and TRL's "normalize_then_sum", then standardise the sum in the batch:
    here that is a call of its own, group_advantages(combined).

    Raises:
        ValueError: rewards are not [S, K] of a floating-point dtype, or there are not K weights.

    As TRL's reward_weights. Source: normalize-then-sum, GDPO arXiv 2601.05242.

    >>> combine_rewards(torch.tensor([[1.0, 10.0], [3.0, torch.nan]]), [1.0, 0.5])
    tensor([6., 3.])
    """
    table = rewards.dim() == 2 and rewards.is_floating_point()
    if not table or weights is not None and len(weights) != rewards.shape[1]:
        raise ValueError(
            "combine_rewards: rewards must be [S, K] of a floating-point dtype, and weights one number for "
            f"each of the K columns; got {rewards.dtype} {list(rewards.shape)} and {weights}."
        )
    total = rewards.new_zeros(rewards.shape[0], dtype=torch.float64)
    for k, column in enumerate(rewards.double().unbind(1)):
        weight = 1.0 if weights is None else weights[k]
        value = group_advantages(column, group) if normalize else column
        total = total + torch.where(column.isnan(), 0.0, weight * value)
    return torch.where(rewards.isnan().all(1), torch.nan, total).to(rewards.dtype)


@torch.no_grad()
def gae(
    reward: Tensor, value: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:  # [..., T], [..., T], [..., T] bool -> [..., T], [..., T]
    """Generalised advantage estimation: (advantage A, returns A + V), both 0 where mask is false.

        A_t = delta_t + gamma lam A_t',   delta_t = r_t + gamma V_t' - V_t,   t' the next live token

    Tokens that are not live might as well not be there, whatever is stored at them. V and A are 0 after the
    last live one, where a reward of the whole completion belongs.

    Raises:
        ValueError: tensors of different shapes, a mask that is not bool, gamma or lam outside [0, 1].

    verl whitens A at once; here `whiten` does. Source: arXiv 1506.02438, equation 16.

    >>> reward, value = torch.tensor([[0.0, torch.nan, 1.0]]), torch.tensor([[0.5, torch.nan, 0.25]])
    >>> gae(reward, value, torch.tensor([[True, False, True]]), lam=0.5)
    (tensor([[0.1250, 0.0000, 0.7500]]), tensor([[0.6250, 0.0000, 1.0000]]))
    """
    _check("gae", mask, reward=reward, value=value)
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gae: gamma and lam are discounts, in [0, 1]; got {gamma} and {lam}.")
    order = mask.int().argsort(dim=-1, descending=True, stable=True)  # live tokens first, as they were
    rewards, values = (torch.where(mask, x, 0.0).double().gather(-1, order) for x in (reward, value))
    advantage = rewards + gamma * F.pad(values, (0, 1))[..., 1:] - values
    # each token's sum over 1, 2, 4, ... from it on, of two half as long: log T steps instead of T
    reach = 1
    while reach < mask.shape[-1]:
        advantage = advantage + (gamma * lam) ** reach * F.pad(advantage, (0, reach))[..., reach:]
        reach *= 2
    dtype = torch.promote_types(reward.dtype, value.dtype)
    advantage, returns = (torch.empty_like(x).scatter_(-1, order, x) for x in (advantage, advantage + values))
    return advantage.to(dtype), returns.to(dtype)


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:  # any shape, bool -> that shape
    """(x - mean) / sqrt(var + 1e-8) over the live tokens of all ranks, 0 where mask is false.

    var is Bessel's; one token, or equal ones, become exact zeros; shift_mean=False adds the mean again. As
    verl's masked_whiten, which refuses a single token and leaves numbers where mask is false. Every rank
    must call it where torch.distributed is initialised.

    Raises:
        ValueError: x and mask of different shapes, or a mask that is not bool.

    >>> whiten(torch.tensor([1.0, 2.0, 3.0, torch.nan]), torch.tensor([True, True, True, False]))
    tensor([-1.,  0.,  1.,  0.])
    """
    _check("whiten", mask, x=x)
    live = torch.where(mask, x, torch.inf).double()
    lowest = all_reduced(F.pad(live.flatten(), (0, 1), value=torch.inf).amin(), "MIN")  # of none: inf
    raised = torch.where(mask, live - lowest, 0.0)  # as in _centred
    count, total = all_reduced(torch.stack([mask.sum().double(), raised.sum()]))
    mean = total / count  # NaN without live tokens, and nowhere to be seen
    centred = torch.where(mask, raised - mean, 0.0)
    var = all_reduced(centred.square().sum()) / (count - 1).clamp(min=1)
    shift = 0.0 if shift_mean else lowest + mean
    return torch.where(mask, centred / (var + 1e-8).sqrt() + shift, 0.0).to(x.dtype)


def value_loss(
    value: Tensor,  # any shape, e.g. [S, T]
    returns: Tensor,  # the same
    mask: Tensor,  # the same, bool
    *,
    old_value: Tensor | None = None,  # the same
    clip: float = 0.2,
    normalizer: float | Tensor | None = None,
) -> Tensor:  # []
    """PPO's loss of the value head: 0.5 max( (v - R)^2, (clip(v, v_old +- c) - R)^2 ), mean over live tokens.

    v, which alone is differentiated, is clipped to within c (reward units) of v_old, the value that `gae`
    had; old_value None: no clip. normalizer divides the sum instead of the number of live tokens (of 0 the
    loss is 0): with the count over the whole optimizer step, micro-batches add up.

    Raises:
        ValueError: tensors of different shapes, a mask that is not bool, clip or normalizer not positive.

    Sources: arXiv 1707.06347, equation 9; the clip is OpenAI's code's, see arXiv 2005.12729.

    >>> returns, old_value = torch.tensor([1.0, 0.1]), torch.zeros(2)
    >>> value_loss(returns, returns, torch.tensor([True, True]), old_value=old_value)  # 0.5 (1 - 0.2)^2 / 2
    tensor(0.1600)
    """
    _check("value_loss", mask, value=value, returns=returns, old_value=old_value)
    for name, number in (("clip", clip), ("normalizer", normalizer)):
        if isinstance(number, (int, float)) and not number > 0:
            raise ValueError(f"value_loss: {name} must be above 0; got {number}.")
    dtype = torch.promote_types(value.dtype, torch.float32)
    value, returns = (torch.where(mask, x, 0.0).to(dtype) for x in (value, returns.detach()))
    squares = (value - returns).square()
    if old_value is not None:
        old = torch.where(mask, old_value.detach(), 0.0).to(dtype)
        squares = torch.maximum(squares, (value.clamp(old - clip, old + clip) - returns).square())
    count = mask.sum().clamp(min=1) if normalizer is None else normalizer
    return (0.5 * squares.sum(dtype=torch.float64) / count).to(dtype)


def _centred(values: Tensor, group: Tensor, unbiased: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of each value the distance from its group's mean, and its group's std and size; all [S] float64.

    group [S]: numbers below S. A NaN counts for nothing, and its distance is 0.
    """
    known = ~values.isnan()

    def total(x: Tensor) -> Tensor:  # [S] -> [S]: the sum over each one's group
        return added_at(x.numel(), group, x)[group]

    lowest = torch.full_like(values, torch.inf)
    lowest = lowest.scatter_reduce_(0, group, torch.where(known, values, torch.inf), "amin")[group]
    raised = torch.where(known, values - lowest, 0.0)  # equal values are 0 here, and so is their mean
    size = total(known.double())
    centred = torch.where(known, raised - total(raised) / size, 0.0)
    return centred, (total(centred.square()) / (size - int(unbiased)).clamp(min=1)).sqrt(), size


def _check(what: str, mask: Tensor, **given: Tensor | None) -> None:
    if mask.dtype != torch.bool:
        raise ValueError(f"{what}: mask must be bool, true at live tokens; got {mask.dtype}. Try mask != 0.")
    for name, x in given.items():
        if x is not None and (x.shape != mask.shape or not x.is_floating_point()):
            expected = f"a floating-point dtype and the mask's shape {list(mask.shape)}"
            raise ValueError(f"{what}: {name} must have {expected}; got {x.dtype} {list(x.shape)}.")
