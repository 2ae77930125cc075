"""max_live pads live rows to a fixed number: the same results, and nothing is read back from the device."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from cases import (
    HUMANLINE,
    SELECTED,
    Case,
    fresh,
    gradients,
    leaves_of,
    loss_id,
    make_case,
    make_head,
    plans_for,
    randn,
)
from tolerances import check_grad, check_logp, check_loss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import fused_align as fa
from fused_align.linear import ops

F64 = torch.float64
LENGTHS, WIDTH = [3, 0, 5, 1, 2, 4], 5
LIVE, POSITIONS = sum(LENGTHS), len(LENGTHS) * WIDTH
BOUNDS = [LIVE, LIVE + 5, POSITIONS, POSITIONS + 100]
OUTPUTS = {"logp": (False, False), "entropy": (True, False), "lse": (False, True), "all": (True, True)}


def small(head: str = "all") -> Case:
    shape = len(LENGTHS), WIDTH
    options = make_head("all" if head == "uncapped" else head, 11, shape)
    if head == "uncapped":  # more plans serve
        options.pop("softcap")
    return make_case(LENGTHS, width=WIDTH, H=5, V=11, head=options)


def per_token(case: Case, loss: fa.Loss) -> dict[str, Tensor]:
    ramp = torch.linspace(-2, 1, case.target.numel(), dtype=F64).view(case.target.shape)
    weight = {"token_weight": ramp.flip(0).abs()}
    return weight if isinstance(loss, fa.GRAO) else {"advantage": ramp, **weight}  # GRAO has one per sequence


def poisoned(case: Case, poison: float, *more: Tensor) -> None:
    """Writes poison to every ignored position, in place."""
    columns = [x for x in case.columns.values() if x.shape == case.target.shape]
    for x in (case.hidden, case.head.get("temperature"), *columns, *more):
        if torch.is_tensor(x):
            x[~case.mask] = poison


def run_stats(
    case: Case, outputs: str, frozen: bool = False, **options: Any
) -> tuple[fa.TokenStats, dict[str, Tensor]]:
    leaves = leaves_of(case, ("weight", "bias") if frozen else ())
    at, (entropy, lse) = case.with_operands(leaves), OUTPUTS[outputs]
    stats = fa.token_stats(at.hidden, at.weight, at.target, **at.head, entropy=entropy, lse=lse, **options)
    terms = [(x * (number + 1)).square().sum() for number, x in enumerate(stats) if x is not None]
    return stats, gradients(torch.stack(terms).sum(), leaves)


def run_align(
    case: Case, loss: fa.Loss, packed: bool = False, frozen: bool = False, changes: Any = None, **options: Any
) -> tuple[fa.AlignOutput, dict[str, Tensor]]:
    """As cases.run_loss, and on request with the same sequences packed."""
    columns = {**case.columns, **(changes or {})}
    if packed:
        shape = case.target.shape
        columns = {k: v.flatten() if v.shape == shape else v for k, v in columns.items()}
        columns["cu_seqlens"] = torch.arange(0, shape.numel() + 1, shape[1], device=case.target.device)
        case = case.flat()
    leaves = leaves_of(case, ("weight", "bias") if frozen else ())
    at = case.with_operands(leaves)
    batch = fa.Batch(at.target, **columns)
    out = fa.align_loss(at.hidden, at.weight, batch, fresh(loss), **at.head, **options)
    return out, gradients(out.loss, leaves)


def same(got: dict[str, Tensor], want: dict[str, Tensor], what: str = "") -> None:
    assert got.keys() == want.keys()
    for name, grad in got.items():
        check_grad(grad, want[name], F64, f"{what} {name}")


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.usefixtures("tiny_tiles")
def test_statistics_of_tokens(outputs: str, frozen: bool, head: str):
    case = small(head)
    for plan in ["auto", "recompute"] + ["jacobian"] * (frozen and not OUTPUTS[outputs][0]):
        want, want_grads = run_stats(case, outputs, frozen, plan=plan)
        for most in BOUNDS:
            got, grads = run_stats(case, outputs, frozen, plan=plan, max_live=most)
            for x, y in zip(got, want, strict=True):
                assert (x is None) == (y is None)
                if x is not None and y is not None:
                    assert torch.equal(x[~case.mask], torch.zeros_like(x[~case.mask])), plan
                    check_logp(x.detach(), y.detach(), F64)
            same(grads, want_grads, f"{plan} {most}")


def test_linear_logp():
    case, found = small(), []
    for most in (None, *BOUNDS):
        leaves = leaves_of(case)
        at = case.with_operands(leaves)
        logp = fa.linear_logp(at.hidden, at.weight, at.target, **at.head, max_live=most)
        found.append({"logp": logp.detach(), **gradients(logp.square().sum(), leaves)})
        same(found[-1], found[0])


@pytest.mark.parametrize(("packed", "humanline"), [(False, HUMANLINE), (True, None)], ids=str)
@pytest.mark.parametrize("loss", SELECTED, ids=loss_id)
@pytest.mark.usefixtures("tiny_tiles")
def test_align_loss(loss: fa.Loss, packed: bool, humanline: fa.Humanline | None):
    """Value, every metric and every gradient, whichever plan runs and however long the padding is."""
    case = small("uncapped")
    options: dict[str, Any] = {"humanline": humanline if loss.anchor else None}
    options["changes"] = per_token(case, loss) if packed else {}
    for frozen in (False, True):
        want, want_grads = run_align(case, loss, packed, frozen, **options)
        plans = [plan for plan in plans_for(loss, frozen_head=frozen) if plan != "window"]
        for plan, most in [(plan, BOUNDS[1]) for plan in plans] + [(plans[-1], most) for most in BOUNDS]:
            out, grads = run_align(case, loss, packed, frozen, plan=plan, max_live=most, **options)
            check_loss(out.loss.detach(), want.loss.detach(), F64)
            assert out.metrics.keys() == want.metrics.keys()
            for name, metric in out.metrics.items():
                assert metric.shape == want.metrics[name].shape == (), name
                check_loss(metric, want.metrics[name], F64)
            same(grads, want_grads, f"{plan} {most}")


@pytest.mark.parametrize("first", [0, 5], ids=["all", "last"])
@pytest.mark.parametrize("loss", SELECTED, ids=loss_id)
def test_sequences_without_tokens(loss: fa.Loss, first: int):
    """What stands in padding must not come from dividing by the length of a sequence that has none."""
    case = small("plain")
    case.target[first:] = -100
    want, want_grads = run_align(case, loss)
    for most in (LIVE, int(case.mask.sum())):
        out, grads = run_align(case, loss, max_live=most)
        check_loss(out.loss.detach(), want.loss.detach(), F64)
        same(grads, want_grads)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("most", [LIVE + 5, POSITIONS + 100])
@pytest.mark.parametrize("loss", [*{type(loss): loss for loss in SELECTED}.values(), fa.SFT()], ids=loss_id)
def test_poison_in_ignored_positions(loss: fa.Loss, most: int, poison: float):
    """Padding reads zeros and writes to a spare row, whatever stands at the positions it points to."""
    case, clean = small("per_token"), small("per_token")
    more = per_token(case, loss)
    poisoned(case, poison, *more.values())
    options: dict[str, Any] = {"max_live": most, "humanline": HUMANLINE if loss.anchor else None}
    for plan in (p for p in plans_for(loss) if p != "window"):
        want, want_grads = run_align(clean, loss, changes=per_token(clean, loss), plan=plan, **options)
        out, grads = run_align(case, loss, changes=more, plan=plan, **options)
        assert torch.equal(out.loss.detach(), want.loss.detach()), plan
        for name, metric in out.metrics.items():
            assert torch.equal(metric, want.metrics[name]), name
        for name, grad in grads.items():
            assert torch.equal(grad, want_grads[name]), f"{plan} {name}"
    want_stats, want_grads = run_stats(clean, "all", max_live=most)
    stats, grads = run_stats(case, "all", max_live=most)
    for x, y in zip((*stats, *grads.values()), (*want_stats, *want_grads.values()), strict=True):
        assert x is not None and y is not None and torch.equal(x, y)


# --- refusals ---


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("most", [0, LIVE - 1])
def test_too_few_rows_raise_on_a_cpu(most: int, backend: str):
    case, sentence = small("plain"), rf"max_live must be at least .* {LIVE}; got {most}"
    with pytest.raises(ValueError, match=sentence):
        run_align(case, fa.DPO(), max_live=most, backend=backend)
    with pytest.raises(ValueError, match=sentence):
        fa.linear_logp(case.hidden, case.weight, case.target, max_live=most, backend=backend)


@pytest.mark.parametrize("most", [-1, 2.5, "7", torch.tensor(40)], ids=repr)
def test_bad_values(most: Any):
    case = small("plain")
    with pytest.raises(ValueError, match=r"align_loss: max_live must be a number.*got"):
        run_align(case, fa.SFT(), max_live=most)
    with pytest.raises(ValueError, match=r"(?s)linear_logp: max_live must be a number.*got"):
        fa.linear_logp(case.hidden, case.weight, case.target, max_live=most)


def test_window_needs_lengths():
    with pytest.raises(ValueError, match=r"(?s)'window'.*lengths.*max_live"):
        run_align(small("plain"), fa.KTO(), plan="window", max_live=LIVE)


# --- nothing is read back: meta tensors have shapes and no data, and reading one raises ---


def has_meta_products() -> bool:
    half = torch.empty(1, 1, dtype=torch.bfloat16, device="meta")
    try:
        torch.mm(half, half, out_dtype=torch.float32)
    except TypeError:
        return False
    return True


on_meta = pytest.mark.skipif(
    not has_meta_products(),
    reason="this torch has no product into another dtype on the meta device; 2.11 has",
)


class Bodies(TorchDispatchMode):
    """Runs the bodies of the custom ops on meta tensors, where torch would run their fakes."""

    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = {"linear_logp_forward": ops._forward, "linear_logp_backward": ops._backward}
        body = made.get(func._schema.name.removeprefix("fused_align::"))
        self.calls += body is not None
        return (func if body is None else body._init_fn)(*args, **(kwargs or {}))


def to_meta(case: Case) -> Case:
    move = partial(tree_map_only, Tensor, lambda x: x.to("meta"))
    return Case(*map(move, (case.hidden, case.weight, case.target, case.head, case.columns)))


@on_meta
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("head", ["plain", "all"])
def test_statistics_read_nothing_back(dtype: torch.dtype, frozen: bool, head: str):
    case = to_meta(small(head).to(dtype))
    for outputs in OUTPUTS:
        for budget in (None, 30_000):
            with Bodies() as bodies:
                _, grads = run_stats(case, outputs, frozen, max_live=LIVE, workspace_bytes=budget)
            assert bodies.calls == 2, "the bodies, not the fakes"
            assert grads["hidden"].is_meta and grads["hidden"].shape == case.hidden.shape
    with pytest.raises(RuntimeError, match="nonzero"), Bodies():
        run_stats(case, "logp", frozen)


@on_meta
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", SELECTED, ids=loss_id)
def test_align_loss_reads_nothing_back(loss: fa.Loss, dtype: torch.dtype):
    options: dict[str, Any] = {"humanline": HUMANLINE if loss.anchor else None}
    for head, packed, frozen in (("plain", False, False), ("uncapped", True, True), ("all", True, False)):
        case = to_meta(small(head).to(dtype))
        for plan in plans_for(loss, frozen, head == "all", dtype)[1:]:
            run = partial(run_align, case, loss, packed=packed, frozen=frozen, **options)
            if plan != "window":
                with Bodies():
                    _, grads = run(plan=plan, max_live=LIVE)
                assert grads["hidden"].is_meta
            with pytest.raises(RuntimeError, match="nonzero"), Bodies():
                run(plan=plan)


@pytest.mark.parametrize("bias", [100.0, -100.0, 1e4])
@pytest.mark.parametrize("plan", ["single", "recompute"])
def test_padding_under_a_large_bias(plan: str, bias: float):
    """The exponentials of rows that are none stay finite, or they would poison dweight."""
    hidden, weight = randn(6, 4, seed=1), randn(20, 4, seed=2)
    target = torch.tensor([[1, -100, 3, 19, -100, 0]])
    grads = []
    for most in (None, 6):
        leaves = {"hidden": hidden.clone().requires_grad_(), "weight": weight.clone().requires_grad_()}
        out = fa.align_loss(
            leaves["hidden"][None], leaves["weight"], fa.Batch(target), fa.SFT(), plan=plan, max_live=most,
            bias=torch.full((20,), bias, dtype=torch.float64),
        )  # fmt: skip
        grads.append(gradients(out.loss, leaves))
    for name, want in grads[0].items():
        check_grad(grads[1][name], want, torch.float64, name)
