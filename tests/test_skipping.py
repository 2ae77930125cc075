"""Rows whose coefficients are all exactly 0 cost no gradient GEMM, and no other rows are dropped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import HUMANLINE, Case, generator, leaves_of, make_case, oracle_loss, run_loss
from test_plans import gemms
from tolerances import check_grad, check_loss
from torch import Tensor

import fused_align as fa
import oracles

F64, F32 = torch.float64, torch.float32
LENGTHS, WIDTH, V, H = [30, 50, 0, 46, 1, 40, 33, 48], 50, 600, 16
ROOM = 4 << 20


def some_case(dtype: torch.dtype = F32) -> Case:
    return make_case(LENGTHS, width=WIDTH, H=H, V=V, scale=1.0).to(dtype)


def work(case: Case, loss: fa.Loss, *, changes: dict | None = None, **options: Any) -> float:
    """GEMM passes over all live tokens."""
    found = gemms(lambda: run_loss(case, loss, changes=changes, **options))
    return sum(found) / (int(case.mask.sum()) * case.weight.numel())


def agrees(case: Case, loss: fa.Loss, *, changes: dict | None = None, **options: Any) -> dict[str, Tensor]:
    """The gradients, after they were held against the oracle's."""
    known = {k: options[k] for k in ("frozen", "humanline") if k in options}
    want, want_grads = oracle_loss(case, loss, changes=changes, **known)
    out, grads = run_loss(case, loss, changes=changes, **options)
    dtype = case.hidden.dtype
    check_loss(out.loss.detach(), want.detach(), dtype)
    assert grads.keys() == want_grads.keys()
    for name, grad in grads.items():
        check_grad(grad, want_grads[name], dtype, name)
    return grads


def half_without_advantage(case: Case) -> tuple[dict[str, Tensor], float]:
    """Advantages of a batch whose groups half agree, and the share of live tokens that have one."""
    advantage = torch.tensor([1.0, 0, 1, 0, -1, 0.5, 0, 0], dtype=case.columns["advantage"].dtype)
    live = int(case.mask[advantage != 0].sum()) / int(case.mask.sum())
    return {"advantage": advantage, "old_logp": None}, live  # type: ignore[dict-item]


@pytest.mark.parametrize("budget", [None, 300_000], ids=["", "small"])
@pytest.mark.parametrize(
    ("plan", "frozen", "passes"),
    [
        ("single", (), (1, 2)),
        ("recompute", (), (1, 3)),
        ("single", ("weight",), (1, 1)),
        ("recompute", ("weight",), (1, 2)),
    ],
    ids=str,
)
def test_sequences_without_advantage(plan: str, frozen: tuple, passes: tuple[int, int], budget: int | None):
    case = some_case()
    changes, f = half_without_advantage(case)
    assert 0.2 < f < 0.6
    options: dict[str, Any] = {"plan": plan, "frozen": frozen, "changes": changes, "workspace_bytes": budget}
    least = passes[0] + passes[1] * f
    # a chunk with a live row multiplies 16 rows at least
    assert 0.99 * least <= work(case, fa.GRPO(), **options) <= least * 1.1
    grads = agrees(case, fa.GRPO(), **options)
    dead = case.mask & (changes["advantage"] == 0)[:, None]
    assert torch.equal(grads["hidden"][dead], torch.zeros_like(grads["hidden"][dead]))


@pytest.mark.parametrize(("plan", "per_row"), [("window", 2), ("recompute", 3)])
@pytest.mark.parametrize("loss", [fa.DPO(), fa.KTO()], ids=["dpo", "kto"])
def test_clipped_tokens(loss: fa.Loss, plan: str, per_row: int):
    case = some_case()
    logp, _, _ = oracles.token_stats(case.hidden.double(), case.weight.double(), case.target)
    inside = HUMANLINE.inside(logp - case.columns["ref_logp"].double()) & case.mask
    f = int(inside.sum()) / int(case.mask.sum())
    assert 0.4 < f < 0.8
    options: dict[str, Any] = {"plan": plan, "humanline": HUMANLINE, "workspace_bytes": ROOM}
    assert work(case, loss, **options) == pytest.approx(1 + per_row * f, rel=0.05)
    agrees(case, loss, **options)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_upstream_gradients_of_zero(share: float, frozen: bool):
    case = some_case()
    up = (torch.rand(case.target.shape, generator=generator(5)) < share).float()
    leaves = leaves_of(case, ("weight",) if frozen else ())

    def run() -> None:
        at = case.with_operands(leaves)
        logp = fa.linear_logp(at.hidden, at.weight, at.target, plan="recompute")
        (logp * up).sum().backward()

    found = sum(gemms(run)) / (int(case.mask.sum()) * case.weight.numel())
    f = int((case.mask & (up != 0)).sum()) / int(case.mask.sum())
    assert found == pytest.approx(1 + (2 if frozen else 3) * f, rel=0.01)
    wide = leaves_of(case.to(F64), ("weight",) if frozen else ())
    logp, _, _ = oracles.token_stats(wide["hidden"], wide["weight"], case.target)
    (logp * up).sum().backward()
    for name, leaf in wide.items():
        if leaf.grad is not None:
            check_grad(leaves[name].grad, leaf.grad, F32, name)


@pytest.mark.parametrize("frozen", [(), ("weight",)], ids=["trainable", "frozen"])
@pytest.mark.parametrize(
    ("loss", "plan"),
    [(fa.GRPO(), "single"), (fa.GRPO(), "recompute"), (fa.DPO(), "window"), (fa.DPO(), "recompute")],
    ids=str,
)
@pytest.mark.parametrize("count", [0, 1])
def test_none_or_one_row_left(loss: fa.Loss, plan: str, frozen: tuple, count: int):
    """By weights of 0: no gradient GEMM at all, or one of very few rows."""
    for dtype in (F64, F32, torch.bfloat16):
        case = some_case(dtype)
        weight = torch.zeros(case.target.shape, dtype=F64 if dtype == F64 else F32)
        if count:
            weight[3][case.mask[3].nonzero()[7, 0]] = 1.5
        options: dict[str, Any] = {
            "changes": {"token_weight": weight}, "plan": plan, "frozen": frozen, "workspace_bytes": ROOM
        }  # fmt: skip
        low = dtype == torch.bfloat16
        once = 2 if low else 1  # what a GEMM lost by rounding is multiplied again
        assert work(case, loss, **options) <= once + 1.01 * (4 * 16) * count / int(case.mask.sum())
        if not low:
            grads = agrees(case, loss, **options)
        else:
            _, grads = run_loss(case, loss, **options)
        touched = grads["hidden"].ne(0).any(-1)
        assert torch.equal(touched, weight.bool())
        assert count or all(torch.equal(grad, torch.zeros_like(grad)) for grad in grads.values())


@pytest.mark.parametrize(
    ("loss", "plan"), [(fa.GRPO(), "single"), (fa.GRPO(), "recompute"), (fa.KTO(), "window")], ids=str
)
def test_a_coefficient_that_is_nan_is_not_zero(loss: fa.Loss, plan: str):
    case = some_case()
    weight = torch.zeros(case.target.shape)
    weight[1][case.mask[1].nonzero()[3, 0]] = float("nan")
    _, grads = run_loss(case, loss, plan=plan, changes={"token_weight": weight})
    assert grads["hidden"][weight.isnan()].isnan().all()
    assert grads["weight"].isnan().any()


@pytest.mark.parametrize("budget", [None, 600_000], ids=["", "small"])
@pytest.mark.parametrize("plan", ["single", "recompute"])
def test_other_statistics_keep_a_row_alive(plan: str, budget: int | None):
    """Advantage 0 leaves the entropy's part, and rows are dropped by what all of them need."""
    case = some_case(F64)
    changes = {"advantage": torch.zeros(len(LENGTHS), dtype=F64)}
    grads = agrees(case, fa.GRPO(entropy_coef=0.2), plan=plan, changes=changes, workspace_bytes=budget)
    assert grads["hidden"][case.mask].ne(0).any(-1).all()
    for entropy, up in ((True, (0.0, 1.0, 0.0)), (True, (0.0, 0.0, 1.0)), (False, (0.0, 0.0, 1.0))):
        leaves, wide = leaves_of(case), leaves_of(case)
        stats = fa.token_stats(leaves["hidden"], leaves["weight"], case.target, entropy=entropy, lse=True)
        want = oracles.token_stats(wide["hidden"], wide["weight"], case.target)
        for each in (stats, want):
            terms = [x.sum() * c for x, c in zip(each, up, strict=True) if x is not None]
            torch.stack(terms).sum().backward()
        for name, leaf in wide.items():
            assert leaf.grad is not None
            check_grad(leaves[name].grad, leaf.grad, F64, name)


# --- a window too small for some pairs ---

PAIRS = [4, 60, 7, 3, 5, 9, 200, 0, 8, 6]  # with their rejected: 13, 260, 7, 11, 11 tokens


@pytest.mark.parametrize("humanline", [None, HUMANLINE], ids=["", "humanline"])
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_a_window_that_one_pair_does_not_fit(dtype: torch.dtype, humanline: fa.Humanline | None):
    case = make_case(PAIRS, width=200, H=H, V=V, scale=1.0).to(dtype)
    budget = 400_000 * dtype.itemsize // 4
    options: dict[str, Any] = {"humanline": humanline, "workspace_bytes": budget}
    agrees(case, fa.DPO(), plan="window", **options)
    agrees(case, fa.DPO(), plan="recompute", **options)
    window, again = (work(case, fa.DPO(), plan=plan, **options) for plan in ("window", "recompute"))
    roomy = work(case, fa.DPO(), plan="window", humanline=humanline, workspace_bytes=ROOM)
    assert roomy * 1.02 < window < again, "the long pair alone is computed again"


def test_a_window_that_no_pair_fits():
    case = make_case([150, 160, 170, 180], width=200, H=H, V=V, scale=1.0)
    with pytest.raises(ValueError, match=r"(?s)plan='window'.*workspace_bytes >= \d+.*got 400000"):
        run_loss(case, fa.DPO(), plan="window", workspace_bytes=400_000)
    agrees(case, fa.DPO(), workspace_bytes=400_000)
    assert work(case, fa.DPO(), workspace_bytes=400_000) == pytest.approx(4, rel=0.01)
