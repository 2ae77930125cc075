"""`stats_from_logits` and `logp_from_logits`: statistics, gradients, gradients in place, on every backend."""

from __future__ import annotations

import kernels
import pytest
import torch
from cases import randn
from tolerances import check_grad, check_like_torch, check_logp
from torch import Tensor

import fused_align as fa

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=["torch", *kernels.BACKENDS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param != "torch":
        kernels.use(request.param, monkeypatch)
    return request.param


def problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """logits [3, 5, 131], target, temperatures of each token."""
    target = torch.arange(15).view(3, 5) * 9 % 131
    target[1, 2] = target[2, :3] = -100
    temperature = 0.5 + torch.rand(3, 5)
    return (3 * randn(3, 5, 131, seed=1)).to(dtype), target, temperature


def truth(logits: Tensor, target: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy, lse, in the dtype of the logits."""
    z, live = logits / temperature.to(logits.dtype)[..., None], target != -100
    logps = z.log_softmax(-1)
    logp = logps.gather(-1, target.clamp(min=0)[..., None]).squeeze(-1)
    found = logp, -(logps.exp() * logps).sum(-1), z.logsumexp(-1)
    return tuple(torch.where(live, x, 0) for x in found)  # type: ignore[return-value]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_output(dtype: torch.dtype, overwrite: bool, backend: str):
    logits, target, temperature = problem(dtype)
    wide, plain = (logits.clone().to(kind).requires_grad_() for kind in (torch.float64, dtype))
    want, rounded = truth(wide, target, temperature), truth(plain, target, temperature)
    upstream = randn(3, 3, 5, seed=2)
    sum((u * x).sum() for u, x in zip(upstream, want, strict=True)).backward()  # type: ignore[union-attr]
    sum((u.to(x.dtype) * x).sum() for u, x in zip(upstream, rounded, strict=True)).backward()  # type: ignore[union-attr]

    ours = logits.clone().requires_grad_()
    options = {"temperature": temperature, "backend": backend, "overwrite": overwrite}
    got = fa.stats_from_logits(ours * 1, target, entropy=True, lse=True, **options)  # type: ignore[arg-type]
    for one, right in zip(got, want, strict=True):
        assert one is not None and one.shape == target.shape
        check_logp(one.detach(), right.detach(), dtype)
    sum((u.to(x.dtype) * x).sum() for u, x in zip(upstream, got, strict=True)).backward()  # type: ignore[union-attr]
    assert ours.grad is not None and wide.grad is not None and plain.grad is not None
    if dtype in DTYPES[:2]:
        check_grad(ours.grad, wide.grad, dtype)
    else:
        check_like_torch(ours.grad, wide.grad, plain.grad, dtype, "gradient")
    assert torch.equal(ours.grad[1, 2], torch.zeros(131, dtype=dtype))


def test_a_gradient_in_place_takes_no_memory(backend: str):
    logits, target, _ = problem(torch.float32)
    leaf = logits.clone().requires_grad_()
    (want,) = torch.autograd.grad(fa.logp_from_logits(leaf, target, backend=backend).sum(), leaf)
    made = leaf * 1
    value = fa.logp_from_logits(made, target, backend=backend, overwrite=True).sum()
    (grad,) = torch.autograd.grad(value, made)
    assert grad.data_ptr() == made.data_ptr()
    assert torch.equal(grad, want)


def test_overwritten_logits_are_not_read_again(backend: str):
    logits, target, _ = problem(torch.float32)
    value = fa.logp_from_logits(logits.requires_grad_() * 1, target, backend=backend, overwrite=True).sum()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("overwrite", [False, True])
def test_shifted_logits_are_read_where_they_lie(overwrite: bool, backend: str):
    """[B, T - 1, V] of [B, T, V]: no matrix, and not copied to be one. What is not in the view stays."""
    logits, target, temperature = problem(torch.float32)
    target, temperature = target[:, :-1], temperature[:, :-1]
    leaf = logits[:, :-1].contiguous().requires_grad_()
    want = truth(leaf, target, temperature)[0]
    want.sum().backward()
    whole = logits.clone().requires_grad_()
    made = whole * 1
    got = fa.logp_from_logits(
        made[:, :-1], target, temperature=temperature, backend=backend, overwrite=overwrite
    )
    check_logp(got.detach(), want.detach().double(), torch.float32)
    got.sum().backward()
    assert whole.grad is not None and leaf.grad is not None
    check_grad(whole.grad[:, :-1], leaf.grad.double(), torch.float32)
    assert torch.equal(whole.grad[:, -1], torch.zeros(3, 131))
    assert overwrite or torch.equal(made, logits)
    assert torch.equal(made[:, -1], logits[:, -1])


@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (1,)], ids=str)
def test_few_or_no_positions(shape: tuple[int, ...], backend: str):
    logits = randn(*shape, 7, seed=3).requires_grad_()
    target = torch.full(shape, 3)
    found = fa.stats_from_logits(logits, target, entropy=True, lse=True, backend=backend)
    for one, want in zip(found, truth(logits, target, torch.ones(shape)), strict=True):
        assert one is not None and one.shape == shape
        torch.testing.assert_close(one, want)
    found.logp.sum().backward()
    assert logits.grad is not None and logits.grad.shape == logits.shape


def test_eager_is_refused():
    logits, target, _ = problem(torch.float32)
    with pytest.raises(ValueError, match='"triton" or "cuda"; got "eager"'):
        fa.logp_from_logits(logits, target, backend="eager")
