"""What only a GPU can show: no waiting for the host, memory as the device counts it, the same bits twice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import kernels
import pytest
import torch
from tolerances import check_grad, check_logp
from torch import Tensor

import fused_align as fa
import oracles

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
N, H, V = 1000, 512, 32003
DEVICE = torch.device("cuda")  # of the fixture `backend`: each backend of kernels is "auto" in turn
LOSSES = [fa.SFT(), fa.DPO(), fa.KTO(), fa.GRPO(beta=0.1), fa.GSPO(), fa.IPO(), fa.CISPO()]


def operands(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, H] and weight [V, H], whose logits have a deviation of 3; target [N], a fifth ignored."""
    generator = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator, device="cuda")
    weight = torch.randn(V, H, generator=generator, device="cuda") * 3 / H**0.5
    target = torch.randint(V, (N,), generator=generator, device="cuda")
    target[::5] = -100
    return hidden.to(dtype), weight.to(dtype), target


def batch_of(target: Tensor) -> fa.Batch:
    shape, generator = (8, N // 8), torch.Generator("cuda").manual_seed(1)
    columns: dict[str, Tensor] = {
        name: -10 + torch.rand(shape, generator=generator, device="cuda") for name in ("old_logp", "ref_logp")
    }
    return fa.Batch(
        target.view(shape), **columns, advantage=torch.randn(8, generator=generator, device="cuda"),
        desirable=torch.arange(8, device="cuda") % 2 == 0, kl=torch.zeros((), device="cuda"),
    )  # fmt: skip


@contextmanager
def no_waiting() -> Iterator[None]:
    """Any wait of the host for the device raises."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def step(loss: fa.Loss | None, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, target = operands()
    hidden.requires_grad_(), weight.requires_grad_()
    if loss is None:
        value = fa.linear_logp(hidden, weight, target, **options).sum()
    else:
        value = fa.align_loss(hidden.view(8, -1, H), weight, batch_of(target), loss, **options).loss
    value.backward()
    assert hidden.grad is not None and weight.grad is not None
    return value.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("plan", ["score", "fused", "jacobian", "recompute"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_against_float64(backend: str, plan: str, dtype: torch.dtype):
    if plan == "fused" and backend != "triton":
        pytest.skip("only triton has the plan fused")
    hidden, weight, target = operands(dtype)
    wide = hidden.double().requires_grad_(), weight.double().requires_grad_()
    want, _, _ = oracles.token_stats(*wide, target)
    graded = plan in ("jacobian", "recompute")
    hidden.requires_grad_(graded), weight.requires_grad_(plan == "recompute")
    got = fa.linear_logp(hidden, weight, target, plan=plan)
    check_logp(got.detach(), want.detach(), dtype)
    if graded and dtype == torch.float32:
        want.sum().backward()
        got.sum().backward()
        check_grad(hidden.grad, wide[0].grad, dtype, "hidden")  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [None, *LOSSES], ids=lambda x: x.name if x else "linear_logp")
@pytest.mark.usefixtures("backend")
def test_the_same_bits_twice(loss: fa.Loss | None):
    for one, other in zip(step(loss), step(loss), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("rows", [1, 7, 300])
def test_a_row_does_not_depend_on_its_neighbours(rows: int):
    hidden, weight, target = operands()
    whole = fa.linear_logp(hidden, weight, target, backend="triton", plan="fused")
    part = fa.linear_logp(hidden[:rows], weight, target[:rows], backend="triton", plan="fused")
    assert torch.equal(part, whole[:rows])


@pytest.mark.parametrize("loss", [None, *LOSSES], ids=lambda x: x.name if x else "linear_logp")
@pytest.mark.usefixtures("backend")
def test_max_live_never_waits(loss: fa.Loss | None):
    options = {"max_live": N, "plan": "recompute" if loss is None or loss.item != "token" else "single"}
    step(loss, **options)  # compiles
    hidden, weight, target = operands()
    hidden.requires_grad_(), weight.requires_grad_()
    batch = batch_of(target)
    with no_waiting():
        if loss is None:
            value = fa.linear_logp(hidden, weight, target, **options).sum()
        else:
            value = fa.align_loss(hidden.view(8, -1, H), weight, batch, loss, normalizer=8.0, **options).loss
        value.backward()


@pytest.mark.parametrize("name", ["torch", *kernels.BACKENDS])
def test_memory_stays_in_the_budget(name: str, monkeypatch: pytest.MonkeyPatch):
    kernels.use(name, monkeypatch, DEVICE)
    hidden, weight, target = operands()
    hidden.requires_grad_(), weight.requires_grad_()
    budget, mandatory = 64 << 20, 2 * (N * H + V * H)
    fa.linear_logp(hidden, weight, target, workspace_bytes=budget).sum().backward()
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fa.linear_logp(hidden, weight, target, workspace_bytes=budget).sum().backward()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= budget + mandatory + (16 << 20), f"{extra >> 20} MiB"


@pytest.mark.usefixtures("backend")
def test_compiled_is_eager():
    hidden, weight, target = operands()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return fa.linear_logp(hidden * 2, weight, target).square().mean()

    leaves = [x.clone().requires_grad_() for x in (hidden, weight) for _ in range(2)]
    loss(leaves[0], leaves[2]).backward()
    torch.compile(loss)(leaves[1], leaves[3]).backward()
    for one, other in ((leaves[0], leaves[1]), (leaves[2], leaves[3])):
        torch.testing.assert_close(one.grad, other.grad)


def test_auto_is_triton():
    assert "triton     runs" in fa.explain(*operands())
