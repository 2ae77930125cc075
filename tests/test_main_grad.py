"""main_grad takes the weight's gradient in the caller's sum; grad_scale is a promise about the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import (
    SELECTED,
    Case,
    fresh,
    leaves_of,
    loss_id,
    make_case,
    make_head,
    oracle_loss,
    plans_for,
    randn,
)
from tolerances import check_grad, check_like_torch, check_loss, relative_errors
from torch import Tensor

import fused_align as fa
from fused_align.linear import plan as planner

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
Grads = dict[str, Any]  # a tensor each, or None
LENGTHS, WIDTH, V, H = [30, 41, 0, 17, 3, 45], 45, 600, 13
SMALL = {F64: 600_000, F32: 350_000}  # several chunks of complete rows


def some_case(head: str = "bias") -> Case:
    shape = len(LENGTHS), WIDTH
    return make_case(LENGTHS, width=WIDTH, H=H, V=V, scale=1.0, head=make_head(head, V, shape))


def work(case: Case) -> torch.dtype:
    return F64 if F64 in (case.hidden.dtype, case.weight.dtype) else F32


def buffer(case: Case) -> Tensor:
    """As an optimizer holds it between micro-batches: not zero."""
    return randn(V, H, seed=99, dtype=work(case)) * 0.01


def run(
    case: Case, loss: fa.Loss | None, *, frozen: tuple[str, ...] = (), factor: float = 1.0, **options: Any
) -> tuple[Tensor, Grads]:
    """Value and gradients of align_loss, or of linear_logp where there is no loss."""
    leaves = leaves_of(case, frozen)
    at = case.with_operands(leaves)
    if loss is None:
        value = fa.linear_logp(at.hidden, at.weight, at.target, **at.head, **options).square().sum() / 100
    else:
        value = fa.align_loss(at.hidden, at.weight, case.batch(), fresh(loss), **at.head, **options).loss
    (value * factor).backward()
    return value.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def into_main(case: Case, loss: fa.Loss | None, **options: Any) -> tuple[Tensor, Grads]:
    """The same with main_grad; the weight's gradient is what the buffer gained."""
    into = buffer(case)
    value, grads = run(case, loss, main_grad=into, **options)
    assert grads["weight"] is None
    return value, {**grads, "weight": into.double() - buffer(case).double()}


def times(grads: Grads, factor: float) -> Grads:
    return {name: grad * factor for name, grad in grads.items()}


def same(got: Grads, want: Grads, dtype: torch.dtype) -> None:
    for name, grad in want.items():
        assert (grad is None) == (got[name] is None), name
        if grad is not None:
            check_grad(got[name], grad.double(), dtype, name)


#: (loss, plan): those without a plan of the forward need no promise
CALLS = [(None, "auto"), (None, "recompute")]
CALLS += [(loss, plan) for loss in SELECTED for plan in plans_for(loss)]


@pytest.mark.parametrize("small", [False, True], ids=["", "small"])
@pytest.mark.parametrize(("loss", "plan"), CALLS, ids=lambda x: loss_id(x) if isinstance(x, fa.Loss) else x)
def test_added_to_what_the_buffer_held(loss: fa.Loss | None, plan: str, small: bool):
    case = some_case()
    options: dict[str, Any] = {"plan": plan, "workspace_bytes": SMALL[work(case)] if small else None}
    want, want_grads = run(case, loss, **options)
    free, promised = {}, {"grad_scale": 1.0}
    for more in [free] if loss is None else [free, promised] if plan in ("auto", "recompute") else [promised]:
        value, grads = into_main(case, loss, **options, **more)
        check_loss(value, want, F64)
        same(grads, want_grads, F64)


@pytest.mark.parametrize("small", [False, True], ids=["", "small"])
@pytest.mark.parametrize("plan", ["single", "window", "recompute"])
@pytest.mark.parametrize(
    ("hidden", "weight"), [(F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F32, F16), (F64, F32)], ids=str
)
def test_dtypes(hidden: torch.dtype, weight: torch.dtype, plan: str, small: bool):
    """In 16 bits the buffer is no further from the truth than a gradient rounded to the weight's dtype."""
    loss = fa.DPO(beta=1.0) if plan == "window" else fa.SFT(label_smoothing=0.1)
    case = some_case().to(hidden, weight)
    _, truth = oracle_loss(case, loss)
    options: dict[str, Any] = {"plan": plan, "workspace_bytes": SMALL[work(case)] if small else None}
    _, plain = run(case, loss, **options)
    _, grads = into_main(case, loss, grad_scale=1.0, **options)
    for name, want in truth.items():
        check_like_torch(grads[name], want, plain[name], F32, name)
    ours, theirs = (relative_errors(x["weight"], truth["weight"])[0] for x in (grads, plain))
    assert ours <= 1.001 * theirs + 1e-6
    if hidden == weight == F32:
        same(grads, plain, F32)


@pytest.mark.parametrize(("loss", "plan"), [(None, "auto"), (fa.PPO(), "single"), (fa.KTO(), "window")])
def test_micro_batches_accumulate(loss: fa.Loss | None, plan: str):
    case, into = some_case(), buffer(some_case())
    more = {} if loss is None else {"grad_scale": 0.5}
    _, want = run(case, loss, plan=plan, factor=0.5)
    for calls in (1, 2, 3):
        run(case, loss, plan=plan, factor=0.5, main_grad=into, **more)
        check_grad(into - buffer(case), calls * want["weight"], F64, f"{calls} calls")


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("loss", [fa.SFT(), fa.DPO(), None], ids=str)
def test_two_calls_before_one_backward(loss: fa.Loss | None, backend: str):
    """Chosen and rejected in calls of their own, or a second loss: both add to one buffer."""
    case, into = some_case(), buffer(some_case())
    weight, plain = (case.weight.clone().requires_grad_() for _ in range(2))
    for at, main in ((weight, {"main_grad": into, "backend": backend}), (plain, {"backend": backend})):
        value = fa.linear_logp(case.hidden, at, case.target, **main).sum()
        if loss is None:
            value = value - fa.linear_logp(case.hidden.flip(1), at, case.target, **main).sum()
        else:
            value = value + fa.align_loss(case.hidden, at, case.batch(), loss, grad_scale=1.0, **main).loss
        value.backward(retain_graph=loss is None)
    assert weight.grad is None
    check_grad(into - buffer(case), plain.grad, F64)
    if loss is None:  # whose graph may run again
        value = fa.linear_logp(case.hidden, weight, case.target, main_grad=into, backend=backend).sum()
        value.backward(retain_graph=True)
        once = into.clone()
        value.backward()
        check_grad(into - buffer(case) - plain.grad, 2 * (once - buffer(case) - plain.grad), F64)


@pytest.mark.parametrize("plan", ["single", "recompute"])
def test_only_the_weight_may_need_a_gradient(plan: str):
    loss, case = fa.SFT(label_smoothing=0.1, z_loss=0.1), some_case()
    for frozen in (("hidden",), ("bias",), ("hidden", "bias")):
        _, want = run(case, loss, plan=plan, frozen=frozen)
        _, grads = into_main(case, loss, plan=plan, frozen=frozen, grad_scale=1.0)
        same(grads, want, F64)


@pytest.mark.parametrize("plan", ["single", "recompute"])
def test_a_view_of_a_larger_buffer(plan: str):
    """Frameworks hand out pieces of one flat tensor; what lies around must stay."""
    case = some_case()
    flat = torch.full((2 * V, H + 3), 7.0, dtype=F64)
    mine = flat[V:, 1 : H + 1]
    run(case, fa.SFT(), plan=plan, grad_scale=1.0, main_grad=mine)
    check_grad(mine - 7, run(case, fa.SFT(), plan=plan)[1]["weight"], F64)
    mine.fill_(7)
    assert torch.equal(flat, torch.full_like(flat, 7))


@pytest.mark.parametrize("loss", [None, fa.PPO(), fa.DPO()], ids=str)
def test_nothing_is_added_for_nothing(loss: fa.Loss | None):
    """Neither while scoring nor for a batch of ignored tokens."""
    case, into = some_case(), buffer(some_case())
    with torch.no_grad():
        fa.linear_logp(case.hidden, case.weight, case.target, main_grad=into)
        fa.align_loss(case.hidden, case.weight, case.batch(), fa.SFT(), main_grad=into, grad_scale=1.0)
    assert torch.equal(into, buffer(case))
    case.target.fill_(-100)
    run(case, loss, main_grad=into, **({} if loss is None else {"grad_scale": 1.0}))
    assert torch.equal(into, buffer(case))


@pytest.mark.parametrize("loss", [None, fa.GRPO(beta=0.1), fa.IPO()], ids=str)
def test_the_eager_backend_honours_it(loss: fa.Loss | None):
    for dtype in (F64, F32):
        case = some_case().to(dtype)
        _, want = run(case, loss, backend="eager")
        _, grads = into_main(case, loss, backend="eager")
        same(grads, want, dtype)


def test_compiled():
    torch._dynamo.reset()
    case = some_case()
    leaves, into = leaves_of(case), buffer(case)

    def call(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, into: Tensor) -> Tensor:
        return fa.linear_logp(hidden * 2, weight, target, bias=bias, main_grad=into).square().sum()

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for calls in (1, 2):
        compiled(leaves["hidden"], leaves["weight"], leaves["bias"], case.target, into).backward()
        other = leaves_of(case)
        logp = fa.linear_logp(other["hidden"] * 2, other["weight"], case.target, bias=other["bias"])
        logp.square().sum().backward()
        assert leaves["weight"].grad is None and other["weight"].grad is not None
        check_grad(into - buffer(case), calls * other["weight"].grad, F64)
        for name in ("hidden", "bias"):
            check_grad(leaves[name].grad, calls * other[name].grad, F64, name)


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)  # 1/3 has no float32: a rounded one arrives
@pytest.mark.parametrize("factor", [0.25, 1 / 3, 1024.0])
@pytest.mark.parametrize("main", [False, True], ids=["", "main_grad"])
@pytest.mark.parametrize("plan", ["single", "window", "recompute"])
def test_a_promise_kept_and_broken(plan: str, main: bool, factor: float, dtype: torch.dtype):
    loss, case = fa.DPO() if plan == "window" else fa.GRPO(entropy_coef=0.1), some_case().to(dtype)
    want, want_grads = run(case, loss, plan=plan)
    call = into_main if main else run
    value, grads = call(case, loss, plan=plan, grad_scale=factor, factor=factor)
    check_loss(value, want.double(), dtype)  # the value is not scaled
    same(grads, times(want_grads, factor), dtype)
    for other in (1.0, factor * 1.5):
        if plan == "recompute":  # promised nothing that it used
            call(case, loss, plan=plan, grad_scale=factor, factor=other)
            continue
        with pytest.raises(RuntimeError, match=r"(?s)align_loss: .*multiplied by.*grad_scale.*promised"):
            call(case, loss, plan=plan, grad_scale=factor, factor=other)


@pytest.mark.parametrize("loss", [fa.SFT(), fa.DPO()], ids=loss_id)
def test_without_the_promise(loss: fa.Loss):
    """auto waits for the backward; a plan that would not is refused, and says what it lacks."""
    case = some_case()
    _, want = run(case, loss)
    _, grads = into_main(case, loss, factor=3.0)
    same(grads, times(want, 3), F64)
    plan = "single" if loss.item == "token" else "window"
    with pytest.raises(ValueError, match=rf"(?s)plan='{plan}'.*grad_scale"):
        run(case, loss, plan=plan, main_grad=buffer(case))


# --- refusals ---


@pytest.mark.parametrize("loss", [None, fa.SFT()], ids=str)
def test_a_buffer_that_does_not_fit(loss: fa.Loss | None):
    case = some_case().to(BF16)
    who = "linear_logp" if loss is None else "align_loss"
    for shape, dtype in (((H, V), F32), ((V + 1, H), F32), ((V, H), BF16), ((V, H), F64)):
        with pytest.raises(ValueError, match=rf"{who}: main_grad must be torch.float32 \[{V}, {H}\].*got"):
            run(case, loss, main_grad=torch.zeros(shape, dtype=dtype))
    with pytest.raises(TypeError, match=rf"{who}: main_grad must be a torch.Tensor; got list"):
        run(case, loss, main_grad=[1.0])
    with pytest.raises(ValueError, match=rf"(?s){who}: main_grad.*weight needs none.*requires_grad_"):
        run(case, loss, main_grad=torch.zeros(V, H), frozen=("weight",))


def test_nothing_is_added_by_a_call_that_raises(monkeypatch: pytest.MonkeyPatch):
    """A bad target in the last of several chunks is seen before the first one is added."""
    monkeypatch.setattr(planner, "MAX_ROWS", {"cpu": 4})
    hidden, weight = randn(8, 3, seed=1).requires_grad_(), randn(11, 3, seed=2).requires_grad_()
    target, into = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 11]]), torch.zeros(11, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="target must lie in"):
        fa.align_loss(
            hidden[None], weight, fa.Batch(target), fa.SFT(), plan="single", main_grad=into, grad_scale=1.0
        )
    assert not into.any()


def test_a_promise_may_be_off_by_rounding():
    hidden, weight = (randn(*shape, seed=1).float().requires_grad_() for shape in ((8, 3), (11, 3)))
    batch = fa.Batch(torch.arange(8)[None])
    for first, second in ((11, 7), (3, 13), (7, 49)):
        out = fa.align_loss(hidden[None], weight, batch, fa.SFT(), grad_scale=1 / (first * second))
        (out.loss / first / second).backward()
