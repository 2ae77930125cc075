"""linear_logp, token_stats and logp_from_logits against the float64 oracle: values and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import HEADS, Case, gradcheck, gradients, leaves_of, make_case, make_head, plans_for, randn
from tolerances import (
    CONFIDENT,
    DIFFERENCE,
    DIFFERENCE_STEP,
    SPLIT_LOGITS,
    check_grad,
    check_like_torch,
    check_logp,
    relative_errors,
)
from torch import Tensor

import fused_align as fa
import oracles

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STATS = ("logp", "entropy", "lse")
LENGTHS = [13, 25, 1, 0, 40, 31, 40, 22, 17]  # 189 live of 360: more than one chunk of 128 rows
KIB = 1 << 10


def wide_case(head: str = "plain", seed: int = 0) -> Case:
    """Odd sizes, several tiles of 256 columns, ignored rows in between."""
    return make_case(LENGTHS, width=40, H=23, V=777, seed=seed, head=make_head(head, 777, (9, 40))).flat()


def our_stats(case: Case, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = fa.token_stats(
        case.hidden, case.weight, case.target, **case.head, entropy=True, lse=True, **options
    )
    assert out.entropy is not None and out.lse is not None
    return out.logp, out.entropy, out.lse


def dot(upstream: Tensor, outputs: tuple[Tensor, ...]) -> Tensor:
    """sum_k <upstream[k], outputs[k]>."""
    return torch.stack([(u.to(x.dtype) * x).sum() for u, x in zip(upstream, outputs, strict=True)]).sum()


def stats_and_gradients(case: Case, upstream: Tensor, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict]:
    """The dense reference in `dtype`, from the case's operands; upstream [3, M] of logp, entropy, lse."""
    wide = case.to(dtype) if dtype != torch.float64 else promote(case)
    leaves = leaves_of(wide)
    at = wide.with_operands(leaves)
    out = oracles.token_stats(at.hidden, at.weight, at.target, **at.head)
    total = dot(upstream, out)
    return tuple(x.detach() for x in out), gradients(total, leaves)


def promote(case: Case) -> Case:
    """The same numbers in float64."""
    head = {k: v.double() if torch.is_tensor(v) else v for k, v in case.head.items()}
    return Case(case.hidden.double(), case.weight.double(), case.target, head)


def our_gradients(
    case: Case, upstream: Tensor, frozen: tuple[str, ...] = (), **options: Any
) -> tuple[Tensor, dict]:
    """linear_logp (only upstream[0] counts)."""
    leaves = leaves_of(case, frozen)
    at = case.with_operands(leaves)
    logp = fa.linear_logp(at.hidden, at.weight, at.target, **at.head, **options)
    return logp.detach(), gradients((logp * upstream[0].to(logp.dtype)).sum(), leaves)


def only_logp(tokens: int) -> Tensor:
    upstream = torch.zeros(3, tokens, dtype=torch.float64)
    upstream[0] = randn(tokens, seed=99)
    return upstream


# --- against the oracle ---


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_logp_entropy_lse(head: str, dtype: torch.dtype, backend: str):
    case = wide_case(head).to(dtype)
    want, want_grad = stats_and_gradients(case, randn(3, 360, seed=98), torch.float64)
    leaves = leaves_of(case)
    got = our_stats(case.with_operands(leaves), backend=backend, workspace_bytes=400 * KIB)
    for name, ours, truth in zip(STATS, got, want, strict=True):
        assert ours.dtype == dtype, name
        check_logp(ours, truth, dtype)
    total = dot(randn(3, 360, seed=98), got)
    for name, grad in gradients(total, leaves).items():
        check_grad(grad, want_grad[name], dtype, name)


@pytest.mark.parametrize("kind", range(3), ids=STATS)
def test_each_output_alone(kind: int):
    case = wide_case("all").to(torch.float32)
    upstream = torch.zeros(3, 360, dtype=torch.float64)
    upstream[kind] = randn(360, seed=97)
    _, want = stats_and_gradients(case, upstream, torch.float64)
    leaves = leaves_of(case)
    got = our_stats(case.with_operands(leaves))[kind]
    for name, grad in gradients((got * upstream[kind].float()).sum(), leaves).items():
        check_grad(grad, want[name], torch.float32, name)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("plan", plans_for(None))
@pytest.mark.parametrize("budget", [None, 150 * KIB])
def test_trainable_head(head: str, plan: str, budget: int | None):
    case = wide_case(head).to(torch.float32)
    upstream = only_logp(360)
    (want, _, _), want_grad = stats_and_gradients(case, upstream, torch.float64)
    got, grads = our_gradients(case, upstream, plan=plan, workspace_bytes=budget)
    check_logp(got, want, torch.float32)
    assert grads.keys() == want_grad.keys()
    for name, grad in grads.items():
        check_grad(grad, want_grad[name], torch.float32, name)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("plan", plans_for(None, frozen_head=True))
@pytest.mark.parametrize("budget", [None, 150 * KIB])
def test_frozen_head(head: str, plan: str, budget: int | None):
    case = wide_case(head).to(torch.float32)
    upstream = only_logp(360)
    (want, _, _), want_grad = stats_and_gradients(case, upstream, torch.float64)
    got, grads = our_gradients(case, upstream, frozen=("weight", "bias"), plan=plan, workspace_bytes=budget)
    check_logp(got, want, torch.float32)
    assert list(grads) == ["hidden"]
    check_grad(grads["hidden"], want_grad["hidden"], torch.float32)


@pytest.mark.parametrize(
    "frozen", [("hidden",), ("hidden", "bias"), ("weight",), ("bias",), ("hidden", "weight")]
)
def test_only_what_needs_a_gradient_gets_one(frozen: tuple[str, ...]):
    case = wide_case("bias").to(torch.float32)
    upstream = only_logp(360)
    _, want = stats_and_gradients(case, upstream, torch.float64)
    _, grads = our_gradients(case, upstream, frozen=frozen)
    assert grads.keys() == want.keys() - set(frozen)
    for name, grad in grads.items():
        check_grad(grad, want[name], torch.float32, name)


@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("plan", ["jacobian", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
@pytest.mark.parametrize("budget", [None, 200 * KIB])
def test_half_operands(head: str, plan: str, dtype: torch.dtype, budget: int | None):
    case = wide_case(head).to(dtype)
    upstream = only_logp(360)
    (want, _, _), want_grad = stats_and_gradients(case, upstream, torch.float64)
    (plain, _, _), plain_grad = stats_and_gradients(case, upstream, dtype)
    frozen = ("weight", "bias") if plan == "jacobian" else ()
    got, grads = our_gradients(case, upstream, frozen=frozen, plan=plan, workspace_bytes=budget)
    assert got.dtype == torch.float32
    # not the rounded logits: those are off by 1e-2
    biggest = oracles.logits(*(t.double() for t in (case.hidden, case.weight))).abs().max().clamp(min=1)
    assert (got.double() - want).abs().max() <= SPLIT_LOGITS * biggest
    check_like_torch(got, want, plain, dtype, "logp")
    for name, grad in grads.items():
        assert grad.dtype == dtype
        check_like_torch(grad, want_grad[name], plain_grad[name], dtype, name)


@pytest.mark.parametrize("dtype", DTYPES[2:], ids=str)
def test_half_entropy_and_lse(dtype: torch.dtype):
    case = wide_case().to(dtype)
    upstream = randn(3, 360, seed=96)
    want, want_grad = stats_and_gradients(case, upstream, torch.float64)
    plain, plain_grad = stats_and_gradients(case, upstream, dtype)
    leaves = leaves_of(case)
    got = our_stats(case.with_operands(leaves))
    for name, ours, truth, theirs in zip(STATS, got, want, plain, strict=True):
        check_like_torch(ours.detach(), truth, theirs, dtype, name)
    total = dot(upstream, got)
    for name, grad in gradients(total, leaves).items():
        check_like_torch(grad, want_grad[name], plain_grad[name], dtype, name)


def test_rounded_precision_is_no_worse_than_torch():
    case = wide_case("bias").to(torch.bfloat16)
    upstream = only_logp(360)
    (want, _, _), want_grad = stats_and_gradients(case, upstream, torch.float64)
    (plain, _, _), plain_grad = stats_and_gradients(case, upstream, torch.bfloat16)
    got, grads = our_gradients(case, upstream, precision="bf16")
    check_like_torch(got, want, plain, torch.bfloat16, "logp")
    for name, grad in grads.items():
        check_like_torch(grad, want_grad[name], plain_grad[name], torch.bfloat16, name)


@pytest.mark.parametrize("plan", ["jacobian", "recompute"])
@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype"),
    [(a, b) for a in DTYPES for b in DTYPES if a != b],
    ids=lambda d: str(d).removeprefix("torch."),
)
def test_mixed_dtypes(hidden_dtype: torch.dtype, weight_dtype: torch.dtype, plan: str):
    case = wide_case("bias").to(hidden_dtype, weight_dtype)
    case.target[::3] = oracles.IGNORE
    both = torch.promote_types(hidden_dtype, weight_dtype)
    upstream = only_logp(360)
    (want, _, _), want_grad = stats_and_gradients(case, upstream, torch.float64)
    (plain, _, _), plain_grad = stats_and_gradients(case, upstream, both)
    frozen = ("weight", "bias") if plan == "jacobian" else ()
    got, grads = our_gradients(case, upstream, frozen=frozen, plan=plan, workspace_bytes=150 * KIB)
    assert got.dtype == (torch.float64 if both == torch.float64 else torch.float32)
    if torch.bfloat16 in (hidden_dtype, weight_dtype) or torch.float16 in (hidden_dtype, weight_dtype):
        biggest = oracles.logits(*(t.double() for t in (case.hidden, case.weight))).abs().max().clamp(min=1)
        assert (got.double() - want).abs().max() <= SPLIT_LOGITS * biggest
    else:
        check_like_torch(got, want, plain, both, "logp")
    for name, grad in grads.items():
        own = case.operands()[name].dtype
        assert grad.dtype == own, name
        # torch's gradient in the promoted dtype, rounded once to the operand's own
        check_like_torch(grad, want_grad[name], plain_grad[name].to(own), torch.float32, name)


def test_autocast_rounds_the_operands_and_returns_their_dtypes():
    case = wide_case().to(torch.float32)
    upstream = only_logp(360)
    with torch.autocast("cpu", torch.bfloat16):
        got, grads = our_gradients(case, upstream)
    rounded, rounded_grads = our_gradients(case.to(torch.bfloat16), upstream)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, rounded, rtol=0, atol=1e-6)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert max(relative_errors(grad, rounded_grads[name].double())) < 2**-8  # that of a bf16 result


@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("plan", ["jacobian", "recompute"])
@pytest.mark.usefixtures("tiny_tiles")
def test_gradcheck_logp(head: str, plan: str):
    small = make_case([3, 0, 4, 2], width=4, H=3, V=11, head=make_head(head, 11, (4, 4))).flat()
    names = ("hidden",) if plan == "jacobian" else ("hidden", "weight", "bias")
    leaves = {k: v for k, v in small.operands().items() if k in names}
    upstream = randn(16, seed=95)

    def scalar(moved: dict[str, Tensor]) -> Tensor:
        at = small.with_operands({**small.operands(), **moved})
        wanted = plan if torch.is_grad_enabled() else "score"
        logp = fa.linear_logp(at.hidden, at.weight, at.target, **at.head, plan=wanted)
        return (logp * upstream).sum()

    gradcheck(scalar, leaves, DIFFERENCE_STEP, DIFFERENCE)


@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.usefixtures("tiny_tiles")
def test_gradcheck_stats(head: str):
    small = make_case([3, 0, 4, 2], width=4, H=3, V=11, head=make_head(head, 11, (4, 4))).flat()
    upstream = randn(3, 16, seed=94)

    def scalar(moved: dict[str, Tensor]) -> Tensor:
        stats = our_stats(small.with_operands(moved))
        return dot(upstream, stats)

    gradcheck(scalar, small.operands(), DIFFERENCE_STEP, DIFFERENCE)


# --- edges ---


@pytest.mark.parametrize("backend", ["torch", "eager"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int, backend: str):
    case = Case(randn(tokens, 5, seed=1), randn(7, 5, seed=2), torch.arange(tokens)).to(torch.float32)
    upstream = only_logp(tokens)
    (want, _, _), want_grad = stats_and_gradients(case, upstream, torch.float64)
    got, grads = our_gradients(case, upstream, backend=backend)
    check_logp(got, want, torch.float32)
    for name in ("hidden", "weight"):
        check_grad(grads[name], want_grad[name], torch.float32, name)


@pytest.mark.parametrize("plan", ["jacobian", "recompute"])
def test_all_masked(plan: str):
    case = wide_case("bias").to(torch.float32)
    case.target.fill_(oracles.IGNORE)
    case.hidden.fill_(float("nan"))
    frozen = ("weight", "bias") if plan == "jacobian" else ()
    got, grads = our_gradients(case, only_logp(360), plan=plan, frozen=frozen)
    assert torch.equal(got, torch.zeros(360))
    for name, grad in grads.items():
        assert torch.equal(grad, torch.zeros_like(grad)), name


def test_ignored_rows_are_zero_and_shapes_are_kept():
    case = make_case([3, 0, 5], width=6, H=8, V=30).to(torch.float32)
    stats = our_stats(case)
    for value in stats:
        assert value.shape == (3, 6)
        assert torch.equal(value[~case.mask], torch.zeros(int((~case.mask).sum())))
        assert (value[case.mask] != 0).all()


def test_another_ignore_index():
    case = wide_case().to(torch.float32)
    want = fa.linear_logp(case.hidden, case.weight, case.target)
    moved = torch.where(case.mask, case.target, -1)
    assert torch.equal(fa.linear_logp(case.hidden, case.weight, moved, ignore_index=-1), want)
    zeros = case.target == 0
    got = fa.linear_logp(case.hidden, case.weight, case.target.clamp(min=0), ignore_index=0)
    assert torch.equal(got, torch.where(zeros, 0, want))


def peaked(gaps: list[float], V: int = 301, H: int = 8) -> Case:
    """Row i's target stands gaps[i] above (or below) every other logit, exactly, up to noise of its own."""
    hidden = torch.zeros(len(gaps), H, dtype=torch.float64)
    hidden[:, 0] = torch.tensor(gaps, dtype=torch.float64)
    hidden[:, 1] = 1
    weight = torch.zeros(V, H, dtype=torch.float64)
    weight[5, 0] = 1
    weight[:, 1] = torch.linspace(-1, 1, V, dtype=torch.float64).to(torch.bfloat16).double()
    weight[:, 2:] = 0.1 * randn(V, H - 2, seed=3)
    return Case(hidden, weight, torch.full((len(gaps),), 5))


@pytest.mark.parametrize("plan", ["jacobian", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_very_unlikely_targets(dtype: torch.dtype, plan: str):
    """logp = -300 and beyond among ordinary rows: the range of float32 exponentials is left far behind."""
    gaps = [0.0, -294.0, 3.0, -70.0, -76.0, -80.0, -86.0, -90.0, -120.0, 12.0, -2000.0, -30000.0]
    case = peaked(gaps).to(dtype)
    upstream = only_logp(len(gaps))
    (want, _, _), want_grad = stats_and_gradients(case, upstream, torch.float64)
    (plain, _, _), plain_grad = stats_and_gradients(case, upstream, dtype)
    frozen = ("weight",) if plan == "jacobian" else ()
    got, grads = our_gradients(case, upstream, frozen=frozen, plan=plan, workspace_bytes=100 * KIB)
    check_logp(got, want, dtype)
    for name, grad in grads.items():
        for row in range(len(gaps)) if name == "hidden" else [slice(None)]:
            check_like_torch(grad[row], want_grad[name][row], plain_grad[name][row], dtype, f"{name}[{row}]")


@pytest.mark.parametrize(
    "head", [{}, {"softcap": 50.0}, {"temperature": 0.25}, {"logit_scale": 20.0}], ids=str
)
def test_unlikely_targets_under_head_options(head: dict):
    case = peaked([1.0, -200.0, -100.0, 4.0])
    case.head = head
    case = case.to(torch.float32)
    upstream = only_logp(4)
    (want, _, _), want_grad = stats_and_gradients(case, upstream, torch.float64)
    (_, _, _), plain_grad = stats_and_gradients(case, upstream, torch.float32)
    got, grads = our_gradients(case, upstream)
    check_logp(got, want, torch.float32)
    for name, grad in grads.items():
        check_like_torch(grad, want_grad[name], plain_grad[name], torch.float32, name)


def test_unlikely_targets_entropy():
    case = peaked([1.0, -294.0, -90.0, 40.0]).to(torch.float32)
    upstream = randn(3, 4, seed=93)
    want, want_grad = stats_and_gradients(case, upstream, torch.float64)
    plain, plain_grad = stats_and_gradients(case, upstream, torch.float32)
    leaves = leaves_of(case)
    got = our_stats(case.with_operands(leaves))
    for name, ours, truth, theirs in zip(STATS, got, want, plain, strict=True):
        check_like_torch(ours.detach(), truth, theirs, torch.float32, name)
    total = dot(upstream, got)
    for name, grad in gradients(total, leaves).items():
        check_like_torch(grad, want_grad[name], plain_grad[name], torch.float32, name)


@pytest.mark.parametrize("plan", ["jacobian", "recompute"])
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_huge_logits(dtype: torch.dtype, plan: str):
    case = wide_case()
    case.weight *= 1e4 / 6  # logits up to about 1e4
    case = case.to(dtype)
    upstream = only_logp(360)
    (want, _, _), want_grad = stats_and_gradients(case, upstream, torch.float64)
    (plain, _, _), plain_grad = stats_and_gradients(case, upstream, dtype)
    assert oracles.logits(case.hidden.double(), case.weight.double()).abs().max() > 8e3
    frozen = ("weight",) if plan == "jacobian" else ()
    got, grads = our_gradients(case, upstream, frozen=frozen, plan=plan)
    check_like_torch(got, want, plain, dtype, "logp")
    for name, grad in grads.items():
        check_like_torch(grad, want_grad[name], plain_grad[name], dtype, name)


@pytest.mark.parametrize("plan", ["jacobian", "recompute"])
def test_certain_targets_keep_their_relative_precision(plan: str):
    """Where log_softmax rounds log p to 0, 1 - p is still right: in logp and in the gradient."""
    gaps = [15.0, 20.0, 30.0, 35.0]
    case = peaked(gaps).to(torch.float32)
    (want, _, _), _ = stats_and_gradients(case, only_logp(4), torch.float64)
    # 1 - p in float64 loses digits too: the sum over the others does not
    z = oracles.logits(case.hidden.double(), case.weight.double())
    odds = (z - z[:, 5:6]).exp().index_fill(1, torch.tensor([5]), 0)
    miss = odds.sum(1) / (1 + odds.sum(1))
    p = odds / (1 + odds.sum(1, keepdim=True))
    truth = miss[:, None] * case.weight[5].double() - p @ case.weight.double()
    upstream = torch.zeros(3, 4, dtype=torch.float64)
    upstream[0] = 1
    frozen = ("weight",) if plan == "jacobian" else ()
    got, grads = our_gradients(case, upstream, frozen=frozen, plan=plan)
    assert (got < 0).all()
    assert ((got.double() + torch.log1p(odds.sum(1))).abs() / miss).max() <= CONFIDENT
    assert ((grads["hidden"].double() - truth).norm(dim=1) / truth.norm(dim=1)).max() <= CONFIDENT
    check_logp(got, want, torch.float32)


@pytest.mark.parametrize("plan", ["jacobian", "recompute"])
def test_a_probability_of_one(plan: str):
    case = peaked([150.0, 1000.0, 30000.0]).to(torch.float32)
    frozen = ("weight",) if plan == "jacobian" else ()
    got, grads = our_gradients(case, only_logp(3), frozen=frozen, plan=plan)
    assert torch.equal(got, torch.zeros(3))
    for name, grad in grads.items():
        assert grad.isfinite().all() and grad.abs().max() < 1e-30, name


def test_one_word_vocabulary():
    case = Case(randn(4, 5, seed=1), randn(1, 5, seed=2), torch.zeros(4, dtype=torch.int64)).to(torch.float32)
    got, grads = our_gradients(case, only_logp(4))
    assert torch.equal(got, torch.zeros(4))
    for name, grad in grads.items():
        assert torch.equal(grad, torch.zeros_like(grad)), name


def test_non_contiguous_operands():
    case = wide_case("bias").to(torch.float32)
    upstream = only_logp(360)
    want, want_grad = our_gradients(case, upstream)
    hidden = case.hidden.t().contiguous().t()
    weight = torch.stack([case.weight, case.weight], dim=2)[..., 0]
    target = torch.stack([case.target, case.target], dim=1)[:, 0]
    bias = torch.stack([case.head["bias"]] * 2, dim=1)[:, 0]
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    for leaf in leaves.values():
        assert not leaf.is_contiguous()
        leaf.requires_grad_()
    logp = fa.linear_logp(hidden, weight, target, bias=bias)
    torch.testing.assert_close(logp.detach(), want, rtol=0, atol=2e-6)
    for name, grad in gradients((logp * upstream[0].float()).sum(), leaves).items():
        check_grad(grad, want_grad[name].double(), torch.float32, name)


def test_expanded_upstream_gradient():
    case = wide_case().to(torch.float32)
    ones = torch.zeros(3, 360, dtype=torch.float64)
    ones[0] = 1
    _, want = our_gradients(case, ones)
    leaves = leaves_of(case)
    got = gradients(fa.linear_logp(leaves["hidden"], leaves["weight"], case.target).sum(), leaves)
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name])


@pytest.mark.parametrize("bad", [777, -1, 10**9])
@pytest.mark.parametrize("backend", ["torch", "eager"])
def test_out_of_range_target(bad: int, backend: str):
    case = wide_case().to(torch.float32)
    case.target[17] = bad
    with pytest.raises(ValueError, match=rf"(?s)target.*777.*got {bad}"):
        fa.linear_logp(case.hidden, case.weight, case.target, backend=backend)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("plan", ["jacobian", "recompute"])
@pytest.mark.parametrize("budget", [None, 150 * KIB])
def test_poison_in_ignored_rows_changes_no_bit(poison: float, plan: str, budget: int | None):
    case = wide_case("all").to(torch.float32)
    upstream = only_logp(360)
    frozen = ("weight", "bias") if plan == "jacobian" else ()
    want, want_grad = our_gradients(case, upstream, frozen=frozen, plan=plan, workspace_bytes=budget)
    case.hidden[~case.mask] = poison
    case.head["temperature"][~case.mask] = poison
    upstream[0, ~case.mask] = poison
    leaves = leaves_of(case, frozen)
    at = case.with_operands(leaves)
    logp = fa.linear_logp(at.hidden, at.weight, at.target, **at.head, plan=plan, workspace_bytes=budget)
    logp.backward(upstream[0].float())
    assert torch.equal(logp.detach(), want)
    for name, grad in want_grad.items():
        got = leaves[name].grad
        assert got is not None and torch.equal(got, grad), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_every_time(dtype: torch.dtype):
    case = wide_case("all").to(dtype)
    first, first_grads = our_gradients(case, only_logp(360), workspace_bytes=150 * KIB)
    again, again_grads = our_gradients(case, only_logp(360), workspace_bytes=150 * KIB)
    assert torch.equal(first, again)
    for name, grad in first_grads.items():
        assert torch.equal(grad, again_grads[name]), name


def test_backward_twice_adds_up():
    case = wide_case().to(torch.float32)
    leaves = leaves_of(case)
    logp = fa.linear_logp(leaves["hidden"], leaves["weight"], case.target)
    logp.sum().backward(retain_graph=True)
    _, once = our_gradients(case, torch.ones(3, 360))
    for name, grad in gradients(logp.sum(), leaves).items():
        torch.testing.assert_close(grad, 2 * once[name])


def test_scoring_leaves_no_graph_and_absent_outputs_are_none():
    case = wide_case().to(torch.float32)
    leaves = leaves_of(case)
    with torch.no_grad():
        assert not fa.linear_logp(leaves["hidden"], leaves["weight"], case.target).requires_grad
        stats = fa.token_stats(leaves["hidden"], leaves["weight"], case.target)
    assert stats.entropy is None and stats.lse is None


# --- logp_from_logits ---


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", ["one", "scalar", "per_token"])
def test_logp_from_logits(dtype: torch.dtype, temperature: str):
    case = make_case([3, 0, 5], width=6, H=8, V=301)
    logits = oracles.logits(case.hidden, case.weight).to(dtype)
    temperatures: dict[str, float | Tensor] = {
        "one": 1.0,
        "scalar": 0.6,
        "per_token": make_head("per_token", 301, (3, 6))["temperature"],
    }
    tau = temperatures[temperature]
    live = case.mask
    logits[~live] = float("nan")
    upstream = randn(3, 6, seed=92)

    def dense(given: Tensor) -> Tensor:  # weight = identity: the logits themselves
        clean = torch.where(live[..., None], given, 0)
        eye = torch.eye(301, dtype=given.dtype)
        return oracles.token_stats(clean, eye, case.target, temperature=tau)[0]

    truth, plain, ours = (logits.to(d).detach().requires_grad_() for d in (torch.float64, dtype, dtype))
    want, theirs = dense(truth), dense(plain)
    got = fa.logp_from_logits(ours, case.target, temperature=tau)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check_logp(got.detach(), want.detach(), dtype)
    for value in (want, theirs, got):
        (value * upstream.to(value.dtype)).sum().backward()
    assert truth.grad is not None and plain.grad is not None and ours.grad is not None
    check_like_torch(ours.grad, truth.grad, plain.grad, dtype, "logits")
    assert torch.equal(ours.grad[~live], torch.zeros_like(ours.grad[~live]))


def test_logp_from_logits_gradcheck():
    logits = randn(4, 7, seed=5)
    target = torch.tensor([0, oracles.IGNORE, 6, 3])
    upstream = randn(4, seed=6)
    gradcheck(
        lambda moved: (fa.logp_from_logits(moved["logits"], target, temperature=0.8) * upstream).sum(),
        {"logits": logits},
        DIFFERENCE_STEP,
        DIFFERENCE,
    )
