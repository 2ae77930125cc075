"""Advantages, rewards and the value loss: against loops in plain Python, and numbers worked out by hand."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from tolerances import check_grad, check_logp, check_loss
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fused_align.losses.advantages import combine_rewards, gae, group_advantages, value_loss, whiten

DTYPES = (torch.float64, torch.float32)
NAN = math.nan


def close(got: Tensor, want: Any) -> None:
    """Within the table's bound of the dtype, per element; NaN only where it is wanted."""
    want = torch.as_tensor(want, dtype=torch.float64)
    assert got.shape == want.shape and torch.equal(got.isnan(), want.isnan())
    check_logp(got[~want.isnan()], want[~want.isnan()], got.dtype)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def some(*shape: int, seed: int = 1, share: float = 0.6) -> Tensor:
    """A mask."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def poisoned(x: Tensor, mask: Tensor) -> Tensor:
    """NaN and infinities where nobody may look."""
    bad = torch.tensor([NAN, math.inf, -math.inf], dtype=x.dtype).repeat(x.numel() // 3 + 1)[: x.numel()]
    return torch.where(mask, x, bad.reshape(x.shape))


# ---- the same in plain Python ----------------------------------------------------------------------------


def spread(values: Sequence[float], unbiased: bool) -> float:
    if len(values) < 2:
        return 0.0
    return statistics.stdev(values) if unbiased else statistics.pstdev(values)


def distance(value: float, others: Sequence[float]) -> float:
    """value - mean, with one rounding."""
    return float(Fraction(value) - statistics.mean(map(Fraction, others)))


def group_oracle(
    reward: list[float],
    group: list[int],
    scale: str = "group",
    unbiased: bool = True,
    eps: float = 1e-4,
    baseline: str = "mean",
) -> list[float]:
    found = []
    for i, (mine, name) in enumerate(zip(reward, group, strict=True)):
        known = [j for j, r in enumerate(reward) if not math.isnan(r)]
        peers = [j for j in known if group[j] == name]
        if math.isnan(mine) or len({reward[j] for j in peers}) == 1:
            found.append(0.0)
            continue
        compared = [j for j in peers if baseline == "mean" or j != i]
        std = spread([reward[j] for j in (peers if scale == "group" else known)], unbiased)
        divisor = 1.0 if scale == "none" else std + eps
        found.append(distance(mine, [reward[j] for j in compared]) / divisor)
    return found


def gae_oracle(
    reward: Tensor, value: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    advantage, returns = torch.zeros(2, *mask.shape, dtype=torch.float64)
    for s in range(mask.shape[0]):
        next_value = next_advantage = 0.0
        for t in reversed(range(mask.shape[1])):
            if mask[s, t]:
                r, v = float(reward[s, t]), float(value[s, t])
                next_advantage = r + gamma * next_value - v + gamma * lam * next_advantage
                next_value = v
                advantage[s, t], returns[s, t] = next_advantage, next_advantage + v
    return advantage, returns


def whiten_oracle(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    live = [float(a) for a in x[mask]]
    found = torch.zeros(x.shape, dtype=torch.float64)
    if live:
        std = math.sqrt((statistics.variance(live) if len(live) > 1 else 0.0) + 1e-8)
        shift = 0.0 if shift_mean else statistics.mean(live)
        whitened = [distance(a, live) / std + shift for a in live]
        found[mask] = torch.tensor(whitened, dtype=torch.float64)
    return found


def value_oracle(
    value: Tensor,
    returns: Tensor,
    mask: Tensor,
    old_value: Tensor | None,
    clip: float = 0.2,
) -> float:
    total, count = 0.0, 0
    for at in mask.nonzero():
        v, goal = float(value[tuple(at)]), float(returns[tuple(at)])
        worst = (v - goal) ** 2
        if old_value is not None:
            old = float(old_value[tuple(at)])
            worst = max(worst, (min(max(v, old - clip), old + clip) - goal) ** 2)
        total, count = total + 0.5 * worst, count + 1
    return total / max(count, 1)


# ---- group_advantages ------------------------------------------------------------------------------------


def test_group_advantages_by_hand():
    reward = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)  # mean 3, squares 4 + 1 + 9 = 14
    close(group_advantages(reward, eps=0.0), [-2 / 7**0.5, -1 / 7**0.5, 3 / 7**0.5])
    population = (14 / 3) ** 0.5
    close(
        group_advantages(reward, unbiased=False),
        [x / (population + 1e-4) for x in (-2, -1, 3)],
    )
    assert group_advantages(reward, scale="none").tolist() == [-2, -1, 3]
    close(group_advantages(reward, scale="none", baseline="leave_one_out"), [1 - 4, 2 - 3.5, 6 - 1.5])


def test_std_of_the_batch_by_hand():
    reward, group = torch.tensor([0.0, 2.0, 4.0, 6.0]).double(), torch.tensor([5, 5, 8, 8])
    std = (20 / 3) ** 0.5  # about 3: 9 + 1 + 1 + 9
    close(group_advantages(reward, group, scale="batch", eps=0.5), [x / (std + 0.5) for x in (-1, 1, -1, 1)])
    same = torch.tensor([1.0, 1.0, 3.0, 3.0])  # the batch has spread, its groups have none
    assert group_advantages(same, group, scale="batch").tolist() == [0.0] * 4


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@given(data=st.data())
def test_group_advantages_are_those_of_the_loop(scale, unbiased, baseline, data):
    size = data.draw(st.integers(0, 9))
    numbers = st.sampled_from([-3.0, 0.0, 0.1, 1.0, 1.5, 1e3, NAN]) | st.floats(-50, 50, width=32)
    ids = st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)])
    reward = data.draw(st.lists(numbers, min_size=size, max_size=size))
    group = data.draw(st.lists(ids, min_size=size, max_size=size))
    options = {"scale": scale, "unbiased": unbiased, "baseline": baseline}
    exact = torch.tensor(reward, dtype=torch.float64)
    got = group_advantages(exact, torch.tensor(group, dtype=torch.int64), **options)
    close(got, group_oracle(reward, group, **options))
    for name in set(group):
        known = {r for r, other in zip(reward, group, strict=True) if other == name and not math.isnan(r)}
        if len(known) == 1:
            assert {a for a, other in zip(got.tolist(), group, strict=True) if other == name} == {0.0}


@given(data=st.data())
def test_what_must_not_matter_does_not(data):
    size = data.draw(st.integers(1, 8))
    reward = randn(size, seed=data.draw(st.integers(0, 99)))
    group = torch.tensor(data.draw(st.lists(st.integers(-2, 2), min_size=size, max_size=size)))
    options: dict[str, Any] = {
        "scale": data.draw(st.sampled_from(["group", "batch", "none"])),
        "unbiased": data.draw(st.booleans()),
        "baseline": data.draw(st.sampled_from(["mean", "leave_one_out"])),
        "eps": 0.0,
    }
    got = group_advantages(reward, group, **options)
    order = torch.tensor(data.draw(st.permutations(range(size))))
    close(group_advantages(reward[order], group[order], **options), got[order])
    close(group_advantages(reward, 1000 - 7 * group, **options), got)  # the numbers are only names
    close(group_advantages(reward + 2.0, group, **options), got)
    close(group_advantages(reward * 4, group, **options), got * (4 if options["scale"] == "none" else 1))
    sums = torch.zeros(5, dtype=torch.float64).index_add(0, group + 2, got)
    close(sums, torch.zeros(5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("eps", [0.0, 1e-4])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_without_spread_gives_exact_zeros(dtype, eps, scale):
    equal = torch.full((3,), 0.1, dtype=dtype)
    for reward in (equal, equal[:1], equal[:0], -1e6 * equal):
        got = group_advantages(reward, scale=scale, eps=eps)
        assert got.dtype == dtype and torch.equal(got, torch.zeros_like(reward))
    alone = group_advantages(randn(4, dtype=dtype), torch.arange(4), scale=scale, eps=eps)
    assert torch.equal(alone, torch.zeros(4, dtype=dtype))


def test_naive_means_would_leave_something():
    """Else the test above could not fail."""
    equal = torch.full((3,), 0.1, dtype=torch.float64)
    assert (equal - equal.sum() / 3).abs().max() > 0


def test_small_differences_of_large_rewards_keep_their_digits():
    reward = [1e6 - 1e-3, 1e6, 1e6 + 1e-3, 1e6 + 2e-3]
    close(group_advantages(torch.tensor(reward, dtype=torch.float64)), group_oracle(reward, [0] * 4))
    coarse = torch.tensor([1e6, 1e6 + 0.0625])  # neighbours in float32
    close(group_advantages(coarse), group_oracle(coarse.tolist(), [0, 0]))


def test_one_reward_that_is_not_known_changes_nothing_for_the_others():
    reward, group = torch.tensor([1.0, NAN, 2.0, 6.0, 4.0, NAN, NAN]), torch.tensor([0, 0, 0, 0, 1, 1, 2])
    got = group_advantages(reward, group)
    close(got[[0, 2, 3]], group_advantages(reward[[0, 2, 3]]))
    assert got[[1, 4, 5, 6]].tolist() == [0.0] * 4


def test_an_infinite_reward_shows():
    got = group_advantages(torch.tensor([1.0, math.inf, 1.0, 2.0]), torch.tensor([0, 0, 1, 1]))
    assert got[:2].isnan().all() and got[2:].isfinite().all()


def test_advantages_carry_no_gradient():
    reward = randn(4).requires_grad_()
    advantage, returns = gae(reward[None], reward[None], torch.ones(1, 4, dtype=torch.bool))
    whitened = whiten(reward, torch.ones(4, dtype=torch.bool))
    for found in (group_advantages(reward), combine_rewards(reward[:, None]), advantage, returns, whitened):
        assert not found.requires_grad


# ---- combine_rewards -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_rewards_are_weighted_and_summed(dtype):
    rewards = torch.tensor([[1.0, 10.0], [NAN, 4.0], [3.0, NAN], [NAN, NAN]], dtype=dtype)
    close(combine_rewards(rewards), [11.0, 4.0, 3.0, NAN])
    for weights in ([2.0, 0.5], (2.0, 0.5), torch.tensor([2.0, 0.5])):
        got = combine_rewards(rewards, weights)
        assert got.dtype == dtype
        close(got, [7.0, 2.0, 6.0, NAN])
    assert group_advantages(combine_rewards(rewards))[3] == 0


def test_rewards_are_normalised_before_they_are_summed_by_hand():
    rewards = torch.tensor([[0.0, 100.0], [1.0, 100.0], [2.0, 400.0]], dtype=torch.float64)
    # means 1 and 200, stds 1 and 100 sqrt(3)
    narrow, wide = 1 / (1 + 1e-4), 100 / (100 * 3**0.5 + 1e-4)
    want = [-2 * narrow - wide, -wide, 2 * narrow + 2 * wide]
    close(combine_rewards(rewards, [2.0, 1.0], normalize=True), want)


@given(data=st.data())
def test_normalised_rewards_are_those_of_the_loop(data):
    size, count = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 3))
    rewards = randn(size, count, seed=data.draw(st.integers(0, 99)))
    rewards[~some(size, count, seed=data.draw(st.integers(0, 99)), share=0.8)] = NAN
    names = data.draw(st.none() | st.lists(st.integers(-1, 1), min_size=size, max_size=size))
    group = None if names is None else torch.tensor(names)
    weights = [0.5, -1.0, 2.0][:count]
    columns = [group_oracle(column, names or [0] * size) for column in rewards.T.tolist()]
    want = torch.zeros(size, dtype=torch.float64)
    for weight, column in zip(weights, columns, strict=True):
        want += weight * torch.tensor(column, dtype=torch.float64)
    want[rewards.isnan().all(1)] = NAN
    got = combine_rewards(rewards, weights, group=group, normalize=True)
    close(got, want)
    order = torch.tensor(data.draw(st.permutations(range(size))))
    moved = None if group is None else group[order]
    close(combine_rewards(rewards[order], weights, group=moved, normalize=True), got[order])
    # neither the unit nor the zero of a reward matters, up to eps
    one = combine_rewards(rewards * 1e6 + 5, weights, group=group, normalize=True)
    other = combine_rewards(rewards * 1e6, weights, group=group, normalize=True)
    assert torch.allclose(one, other, rtol=0, atol=1e-8, equal_nan=True)


# ---- gae -------------------------------------------------------------------------------------------------


def test_gae_by_hand():
    reward, value = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[0.5, 1.0]]).double()
    advantage, returns = gae(reward, value, torch.tensor([[True, True]]), gamma=0.5, lam=0.5)
    # delta = 1 + 0.5 * 1 - 0.5 = 1 and 2 - 1 = 1
    assert advantage.tolist() == [[1.25, 1.0]] and returns.tolist() == [[1.75, 2.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 64, 65, 200])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_gae_is_that_of_the_loop_whatever_is_masked(dtype, width, gamma, lam):
    reward, value = randn(6, width, seed=2, dtype=dtype), randn(6, width, seed=3, dtype=dtype)
    mask = some(6, width)
    mask[0], mask[1] = True, False
    want = gae_oracle(reward, value, mask, gamma, lam)
    found = gae(poisoned(reward, mask), poisoned(value, mask), mask, gamma=gamma, lam=lam)
    for got, expected in zip(found, want, strict=True):
        assert got.dtype == dtype and torch.equal(got[~mask], torch.zeros_like(got[~mask]))
        close(got, expected)


def test_masked_tokens_might_as_well_not_be_there():
    reward, value, mask = randn(1, 40, seed=2), randn(1, 40, seed=3), some(1, 40)
    whole = torch.ones(1, int(mask.sum()), dtype=torch.bool)
    for got, want in zip(
        gae(reward, value, mask), gae(reward[mask][None], value[mask][None], whole), strict=True
    ):
        close(got[mask], want[0])


@given(seed=st.integers(0, 99), width=st.integers(1, 20))
def test_gae_between_its_extremes(seed, width):
    reward, value = randn(2, width, seed=seed), randn(2, width, seed=seed + 100)
    mask = torch.ones(2, width, dtype=torch.bool)
    later = reward.flip(1).cumsum(1).flip(1)
    advantage, returns = gae(reward, value, mask, lam=1.0)
    close(advantage, later - value)  # the return that was had, less what was expected
    close(returns, later)
    following = torch.cat([value[:, 1:], torch.zeros(2, 1).double()], 1)
    close(gae(reward, value, mask, lam=0.0, gamma=0.9)[0], reward + 0.9 * following - value)
    constant, _ = gae(3 * reward, 3 * value, mask)
    close(constant, 3 * gae(reward, value, mask)[0])
    swapped, _ = gae(reward.flip(0), value.flip(0), mask)
    close(swapped, gae(reward, value, mask)[0].flip(0))


def test_gae_takes_the_finer_dtype():
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantage, returns = gae(torch.zeros(1, 3), torch.zeros(1, 3, dtype=torch.bfloat16), mask)
    assert advantage.dtype == returns.dtype == torch.float32


# ---- whiten ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_is_that_of_the_loop_whatever_is_masked(dtype, shift_mean):
    x, mask = randn(5, 9, dtype=dtype) * 3 + 7, some(5, 9)
    got = whiten(poisoned(x, mask), mask, shift_mean=shift_mean)
    assert got.dtype == dtype and torch.equal(got[~mask], torch.zeros_like(got[~mask]))
    close(got, whiten_oracle(x, mask, shift_mean))


@given(seed=st.integers(0, 99), size=st.integers(2, 30))
def test_whitened_numbers_have_mean_0_and_variance_1(seed, size):
    x, mask = randn(size, seed=seed) * 10, torch.ones(size, dtype=torch.bool)
    got = whiten(x, mask)
    close(got.mean(), 0.0)
    want = float(x.var())
    assert float(got.var()) == pytest.approx(want / (want + 1e-8), rel=1e-12)
    close(whiten(x + 64, mask), got)
    close(whiten(x.flip(0), mask), got.flip(0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("x", [[0.1], [0.1] * 3, [0.1] * 10, [1e6 + 0.1] * 7, []])
def test_whiten_gives_exact_zeros_without_spread(dtype, x):
    values = torch.tensor([*x, NAN], dtype=dtype)
    mask = torch.tensor([True] * len(x) + [False])
    assert whiten(values, mask).tolist() == [0.0] * (len(x) + 1)
    assert whiten(values, mask, shift_mean=False)[:-1].tolist() == values[:-1].tolist()
    assert whiten(values, torch.zeros_like(mask)).tolist() == [0.0] * (len(x) + 1)


def test_whiten_keeps_the_digits_of_small_differences():
    x, mask = 1e6 + randn(50) * 1e-3, torch.ones(50, dtype=torch.bool)
    close(whiten(x, mask), whiten_oracle(x, mask))


def _whiten_on_a_rank(rank: int, folder: str, x: Tensor, mask: Tensor) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    part = slice(0, 3) if rank == 0 else slice(3, None)
    nothing = torch.zeros_like(mask[part]) if rank == 1 else mask[part]
    found = [whiten(x[part], mask[part]), whiten(x[part], mask[part], shift_mean=False)]
    torch.save([*found, whiten(x[part], nothing)], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_whiten_is_over_all_ranks(tmp_path):
    x, mask = randn(5, 8) * 2 + 3, some(5, 8)
    torch.multiprocessing.spawn(_whiten_on_a_rank, (str(tmp_path), x, mask), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    close(torch.cat([first[0], second[0]]), whiten(x, mask))
    close(torch.cat([first[1], second[1]]), whiten(x, mask, shift_mean=False))
    close(first[2], whiten(x[:3], mask[:3]))  # a rank without live tokens adds nothing
    assert torch.equal(second[2], torch.zeros_like(second[2]))


# ---- value_loss ------------------------------------------------------------------------------------------


def test_value_loss_by_hand():
    value, returns, old_value = torch.tensor(
        [[1.0, 0.1, -2.0], [0.0, 0.0, -1.9], [0.5, 0.0, 0.0]], dtype=torch.float64
    )
    mask = torch.tensor([True, True, True])
    close(value_loss(value, returns, mask), 0.5 * (1 + 0.01 + 0.01) / 3)
    # clipped to 0.7, 0.1 and -0.2, the last of which is 1.7 away instead of 0.1
    close(value_loss(value, returns, mask, old_value=old_value), 0.5 * (1 + 0.01 + 2.89) / 3)
    close(value_loss(value, returns, mask, old_value=old_value, clip=1.0), 0.5 * (1 + 0.01 + 0.81) / 3)
    two = torch.tensor([True, False, True])
    close(value_loss(value, returns, two, old_value=old_value), 0.5 * (1 + 2.89) / 2)
    close(value_loss(value, returns, two, old_value=old_value, normalizer=10), 0.5 * (1 + 2.89) / 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clip", [0.05, 0.2, 5.0, None])
def test_value_loss_is_that_of_the_loop_whatever_is_masked(dtype, clip):
    value, returns, old = (randn(4, 7, seed=seed, dtype=dtype) for seed in (5, 6, 7))
    mask = some(4, 7)
    parts = [poisoned(x, mask) for x in (value, returns, old)]
    options = {} if clip is None else {"old_value": parts[2], "clip": clip}
    got = value_loss(parts[0], parts[1], mask, **options)
    want = value_oracle(value, returns, mask, None if clip is None else old, clip or 0.0)
    assert got.dtype == dtype
    check_loss(got, torch.tensor(want, dtype=torch.float64), dtype)


def test_gradient_of_the_value_loss():
    mask, parts = some(3, 5), [randn(3, 5, seed=seed) for seed in (5, 6, 7)]
    value, returns, old_value = (poisoned(x, mask).requires_grad_() for x in parts)
    value_loss(value, returns, mask, old_value=old_value).backward()
    assert returns.grad is None and old_value.grad is None and value.grad is not None
    assert torch.equal(value.grad[~mask], torch.zeros_like(value.grad[~mask]))
    for old in (None, parts[2]):

        def loss(v: Tensor, old: Tensor | None = old) -> Tensor:
            return value_loss(v, parts[1], mask, old_value=old)

        assert torch.autograd.gradcheck(loss, (parts[0].clone().requires_grad_(),))
    value.grad = None
    value_loss(value, returns, mask).backward()
    want = torch.where(mask, (parts[0] - parts[1]) / mask.sum(), 0.0)
    check_grad(value.grad, want, torch.float64)


def test_values_that_moved_too_far_towards_the_return_get_no_gradient():
    value = torch.tensor([0.5, 0.5, 0.1]).requires_grad_()
    returns, old_value = torch.tensor([1.0, -1.0, 1.0]), torch.zeros(3)
    value_loss(
        value, returns, torch.ones(3, dtype=torch.bool), old_value=old_value, normalizer=1.0
    ).backward()
    assert value.grad is not None
    close(value.grad, [0.0, 1.5, -0.9])  # held back; pulled back; within the clip


def test_micro_batches_add_up_and_nothing_live_is_0():
    value, returns, mask = randn(4, 6, seed=5), randn(4, 6, seed=6), some(4, 6)
    count = mask.sum()
    for normalizer in (count, int(count)):
        parts = [
            value_loss(value[i], returns[i], mask[i], normalizer=normalizer)
            for i in (slice(0, 1), slice(1, 4))
        ]
        close(torch.stack(parts).sum(), value_loss(value, returns, mask))
    value.requires_grad_()
    nothing = value_loss(value, returns, torch.zeros_like(mask))
    nothing.backward()
    assert value.grad is not None and torch.equal(value.grad, torch.zeros_like(value))
    assert float(nothing.detach()) == 0


def test_value_loss_of_16_bit_values_is_taken_in_float32():
    value, returns, mask = randn(3, 9, seed=5).bfloat16(), randn(3, 9, seed=6).float(), some(3, 9)
    got = value_loss(value, returns, mask)
    assert got.dtype == torch.float32
    check_loss(got, torch.tensor(value_oracle(value, returns, mask, None)).double(), torch.float32)


# ---- all of them -----------------------------------------------------------------------------------------


def test_nothing_looks_at_a_tensors_values():
    """Fake tensors have none: whatever would wait for a GPU raises."""
    with FakeTensorMode():
        x, mask = torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.bool)
        group = torch.zeros(4, dtype=torch.int64)
        for scale in ("group", "batch", "none"):
            assert group_advantages(x[:, 0], group, scale=scale, baseline="leave_one_out").shape == (4,)
        assert combine_rewards(x, torch.ones(6), group=group, normalize=True).shape == (4,)
        assert gae(x, x, mask)[0].shape == whiten(x, mask).shape == (4, 6)
        assert value_loss(x, x, mask, old_value=x, normalizer=torch.ones(())).shape == ()


MASK = torch.ones(2, 3, dtype=torch.bool)
X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: group_advantages(X),
            r"reward must be \[S\].*got torch.float32 \[2, 3\].*combine_rewards first",
        ),
        (lambda: group_advantages(torch.zeros(2).long()), r"floating-point.*got torch.int64 \[2\]"),
        (
            lambda: group_advantages(X[0], torch.zeros(2).long()),
            r"group \[S\] int64; got .* torch.int64 \[2\]",
        ),
        (lambda: group_advantages(X[0], torch.zeros(3)), r"group \[S\] int64; got .* torch.float32 \[3\]"),
        (
            lambda: group_advantages(X[0], scale="std"),
            'scale must be "group", "batch" or "none"; got \'std\'',
        ),
        (lambda: group_advantages(X[0], baseline="loo"), "baseline must be \"mean\".*got 'loo'"),
        (lambda: group_advantages(X[0], eps=-1.0), "eps .*must be 0 or more; got -1.0"),
        (lambda: group_advantages(X[0], eps=NAN), "eps .*must be 0 or more; got nan"),
        (lambda: combine_rewards(X[0]), r"rewards must be \[S, K\].*got torch.float32 \[3\]"),
        (lambda: combine_rewards(X.long()), r"floating-point.*got torch.int64 \[2, 3\]"),
        (lambda: combine_rewards(X, [1.0, 2.0]), r"one number for each of the K columns; got .*\[1.0, 2.0\]"),
        (lambda: gae(X, X, X), "gae: mask must be bool.*got torch.float32. Try mask != 0"),
        (lambda: gae(X[:1], X, MASK), r"gae: reward must have .*\[2, 3\]; got torch.float32 \[1, 3\]"),
        (lambda: gae(X, X.long(), MASK), r"gae: value must have a floating-point dtype.*got torch.int64"),
        (lambda: gae(X, X, MASK, gamma=1.5), r"discounts, in \[0, 1\]; got 1.5 and 0.95"),
        (lambda: gae(X, X, MASK, lam=NAN), r"discounts, in \[0, 1\]; got 1.0 and nan"),
        (lambda: whiten(X, MASK[0]), r"whiten: x must have .* shape \[3\]; got torch.float32 \[2, 3\]"),
        (lambda: whiten(X, X), "whiten: mask must be bool"),
        (lambda: value_loss(X, X[0], MASK), r"value_loss: returns must have .*got torch.float32 \[3\]"),
        (lambda: value_loss(X, X, MASK, old_value=X[0]), r"value_loss: old_value must have .*\[2, 3\]"),
        (lambda: value_loss(X, X, MASK, clip=0.0), "value_loss: clip must be above 0; got 0.0"),
        (lambda: value_loss(X, X, MASK, clip=NAN), "value_loss: clip must be above 0; got nan"),
        (lambda: value_loss(X, X, MASK, normalizer=0), "value_loss: normalizer must be above 0; got 0"),
    ],
)
def test_errors_are_sentences(call, message):
    with pytest.raises(ValueError, match=message):
        call()
