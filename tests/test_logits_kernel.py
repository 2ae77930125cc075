"""The kernels over logits that exist already, of each backend, against log_softmax in float64."""

from __future__ import annotations

import pytest
import torch
from kernels import DEVICE
from oracles_base import IGNORE
from tolerances import CONFIDENT, check_grad, check_like_torch, check_logp
from torch import Tensor

from fused_align import backends
from fused_align.backends import Steps

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 1), (5, 7), (37, 131), (20, 777)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def steps(backend: str) -> Steps:
    return backends.steps(backend)


def case(rows: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """logits [rows, vocab] and target [rows], some of them ignored."""
    maker = torch.Generator().manual_seed(seed)
    z = 4 * torch.randn(rows, vocab, dtype=torch.float64, generator=maker)
    y = torch.randint(0, vocab, (rows,), generator=maker)
    y[3::7] = IGNORE
    return z.to(dtype).to(DEVICE), y.to(DEVICE)


def work(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def heat(rows: int, dtype: torch.dtype) -> Tensor:  # [rows]
    maker = torch.Generator().manual_seed(5)
    return (0.5 + torch.rand(rows, dtype=torch.float64, generator=maker)).to(work(dtype)).to(DEVICE)


def truth(z: Tensor, y: Tensor, inverse: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """logp, lse, entropy [rows] float64 of logits [rows, V] and 1 / temperature; differentiable."""
    scale = inverse.double()[:, None] if isinstance(inverse, Tensor) else inverse
    z = z.double() * scale
    log_p = torch.log_softmax(z, 1)
    live = y != IGNORE
    logp = log_p.gather(1, torch.where(live, y, 0)[:, None]).squeeze(1)
    entropy = -torch.where(log_p == -torch.inf, 0, log_p.exp() * log_p).sum(1)
    return torch.where(live, logp, 0), torch.where(live, z.logsumexp(1), 0), torch.where(live, entropy, 0)


def same(found: tuple, want: tuple, rows: Tensor | slice = slice(None)) -> bool:
    """Whether statistics agree in every bit, on some of `found`'s rows."""
    return all(torch.equal(one[rows], other) for one, other in zip(found, want, strict=True))


def check(found: tuple, want: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    for got, right in zip(found[:3], want, strict=True):
        assert got.dtype == work(dtype)
        check_logp(got, right, dtype)


@every_dtype
@pytest.mark.parametrize("rows, vocab", SIZES)
@pytest.mark.parametrize("per_row", [False, True], ids=["scalar", "per row"])
def test_forward(steps: Steps, rows: int, vocab: int, dtype: torch.dtype, per_row: bool):
    z, y = case(rows, vocab, dtype)
    inverse = 1 / heat(rows, dtype) if per_row else None
    found = steps.logit_stats(z, y, inverse, 1.0 if per_row else 1 / 0.7, entropy=True)
    check(found, truth(z, y, 1 / 0.7 if inverse is None else inverse), dtype)
    again = steps.logit_stats(z, y, inverse, 1.0 if per_row else 1 / 0.7)
    assert again.entropy is None
    for name in ("logp", "lse", "largest", "total"):
        assert torch.equal(getattr(found, name), getattr(again, name)), name


@every_dtype
@pytest.mark.parametrize("rows, vocab", SIZES)
@pytest.mark.parametrize("given", ["logp", "logp lse", "logp entropy", "logp lse entropy"])
def test_backward(steps: Steps, rows: int, vocab: int, dtype: torch.dtype, given: str):
    z, y = case(rows, vocab, dtype)
    inverse = 1 / heat(rows, dtype)
    maker = torch.Generator().manual_seed(9)
    coefs: list[Tensor | None] = [
        torch.randn(rows, dtype=torch.float64, generator=maker).to(work(dtype)).to(DEVICE)
        if name in given.split() else None
        for name in ("logp", "lse", "entropy")
    ]  # fmt: skip
    exact = z.double().requires_grad_()
    stats = truth(exact, y, inverse)
    sum((c * s).sum() for c, s in zip(coefs, stats, strict=True) if c is not None).backward()  # type: ignore[union-attr]
    found = steps.logit_stats(z, y, inverse, 1.0, entropy="entropy" in given)
    out = torch.full_like(z, torch.nan)
    steps.logit_gradient(*coefs, z, y, found, inverse, 1.0, out=out)  # type: ignore[arg-type]
    want = exact.grad
    assert want is not None
    if vocab == 1:  # nothing to learn, but for lse
        assert (out - want.to(dtype)).abs().max() < 1e-6
    elif dtype in (torch.float64, torch.float32):
        check_grad(out, want, dtype)
    else:
        check_like_torch(out, want, want.to(dtype), dtype, "gradient")
    steps.logit_gradient(*coefs, z, y, found, inverse, 1.0, out=z)  # type: ignore[arg-type]
    assert torch.equal(z, out), "in place"


def test_a_scalar_temperature_in_the_backward(steps: Steps):
    for dtype in (torch.float64, torch.float32):
        z, y = case(9, 33, dtype)
        exact = z.double().requires_grad_()
        truth(exact, y, 1 / 0.7)[0].sum().backward()
        found, out = steps.logit_stats(z, y, None, 1 / 0.7), torch.empty_like(z)
        # the gradient of a sum is one number, expanded
        steps.logit_gradient(z.new_ones(()).expand(9), None, None, z, y, found, None, 1 / 0.7, out=out)
        assert exact.grad is not None
        check_grad(out, exact.grad, dtype)


@every_dtype
def test_strided_rows(steps: Steps, dtype: torch.dtype):
    z, y = case(9, 133, dtype)
    whole, double = z.clone(), torch.stack([y, y], 1)
    found = steps.logit_stats(whole[:, :-2], double[:, 0] % 131, None, 1.0, entropy=True)
    want = steps.logit_stats(whole[:, :-2].contiguous(), y % 131, None, 1.0, entropy=True)
    assert same(found, want)
    ones = torch.ones_like(found.logp)
    out = torch.empty_like(whole[:, :-2].contiguous())
    steps.logit_gradient(ones, None, None, whole[:, :-2], y % 131, found, None, 1.0, out=out)
    steps.logit_gradient(ones, None, None, whole[:, :-2], y % 131, found, None, 1.0, out=whole[:, :-2])
    assert torch.equal(whole[:, :-2], out)
    assert torch.equal(whole[:, -2:], z[:, -2:]), "beside the view"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_sure_and_hopeless_tokens_keep_their_digits(steps: Steps, dtype: torch.dtype):
    z, y = case(6, 300, dtype)
    y = y.clamp(min=0)
    for row, lead in enumerate((20.0, 60.0, 90.0, -30.0, -300.0, -2000.0)):
        z[row, y[row]] = lead
    exact = z.double().requires_grad_()
    want = truth(exact, y, 1.0)
    want[0].sum().backward()
    # log_softmax itself has no digits there: log p = -log1p(sum of the others / e^z_y)
    others = exact.detach().scatter(1, y[:, None], -torch.inf).logsumexp(1)
    exact_logp = -torch.nn.functional.softplus(others - exact.detach().gather(1, y[:, None]).squeeze(1))
    found, out = steps.logit_stats(z, y, None, 1.0, entropy=True), torch.empty_like(z)
    error = (found.logp.double() - exact_logp).abs() / exact_logp.abs().clamp(min=torch.finfo(dtype).tiny)
    assert error.max() <= CONFIDENT, error
    steps.logit_gradient(torch.ones_like(found.logp), None, None, z, y, found, None, 1.0, out=out)
    own = out.gather(1, y[:, None]).squeeze(1).double()
    assert ((own + torch.expm1(exact_logp)).abs() <= CONFIDENT * own.abs()).all()
    assert (out.double().sum(1).abs() <= CONFIDENT * own.abs()).all(), "the row's gradient sums to 0"
    assert exact.grad is not None
    check_grad(out, exact.grad, torch.float32)


@every_dtype
def test_ignored_rows_are_not_read(steps: Steps, dtype: torch.dtype):
    z, y = case(12, 131, dtype)
    clean = steps.logit_stats(z, y, None, 1.0, entropy=True)
    dirty = z.clone()
    dirty[y == IGNORE] = torch.nan
    found = steps.logit_stats(dirty, y, None, 1.0, entropy=True)
    assert same(found, clean)
    assert (found.logp[y == IGNORE] == 0).all() and (found.lse[y == IGNORE] == 0).all()
    coef = torch.where(y == IGNORE, torch.nan, 1.0).to(found.logp)
    steps.logit_gradient(coef, coef, coef, dirty, y, found, None, 1.0, out=dirty)
    assert (dirty[y == IGNORE] == 0).all() and dirty.isfinite().all()


def test_rows_without_a_coefficient_are_not_read(steps: Steps):
    z, y = case(12, 131, torch.float32)
    found = steps.logit_stats(z, y, None, 1.0)
    z[5] = torch.nan
    coef = torch.ones(12, device=DEVICE)
    coef[5] = 0
    out = torch.empty_like(z)
    steps.logit_gradient(coef, None, None, z, y, found, None, 1.0, out=out)
    assert (out[5] == 0).all() and out.isfinite().all()


def test_targets_outside_the_vocabulary(steps: Steps):
    z, y = case(8, 33, torch.float32)
    y[0], y[1], y[2] = 33, -1, 10**12
    found = steps.logit_stats(z, y, None, 1.0, entropy=True)
    want = truth(z, y.clamp(0, 32), 1.0)
    assert found.logp[:3].isnan().all() and found.logp[3:].isfinite().all()
    assert found.entropy is not None
    check_logp(found.lse[:3], want[1][:3], torch.float32)
    check_logp(found.entropy[:3], want[2][:3], torch.float32)


@every_dtype
def test_banned_tokens(steps: Steps, dtype: torch.dtype):
    """Logits of -inf, and of the lowest number, over more than the first block of columns."""
    z, y = case(8, 777, dtype)
    y = torch.where(y == IGNORE, IGNORE, 700)
    z[:, :600] = -torch.inf
    z[2, :600] = torch.finfo(dtype).min
    exact = z.double().requires_grad_()
    want = truth(exact, y, 1.0)
    found = steps.logit_stats(z, y, None, 1.0, entropy=True)
    check(found, want, dtype)
    one, out = torch.ones_like(found.logp), torch.empty_like(z)
    steps.logit_gradient(one, one, one, z, y, found, None, 1.0, out=out)
    assert out.isfinite().all() and (out[:, :600] == 0).all()
    y[0] = 3  # the target itself
    assert steps.logit_stats(z, y, None, 1.0).logp[0] == -torch.inf


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy, of inf - inf
def test_bad_rows_keep_to_themselves(steps: Steps):
    z, y = case(12, 600, torch.float32)
    y = y.clamp(min=0)
    clean = steps.logit_stats(z, y, None, 1.0, entropy=True)
    z[2, 5], z[4, 300], z[6, 7], z[6, 300] = torch.nan, torch.inf, torch.nan, torch.inf
    z[8, y[8]] = torch.nan
    found = steps.logit_stats(z, y, None, 1.0, entropy=True)
    bad = torch.zeros(12, dtype=torch.bool, device=DEVICE)
    bad[2:9:2] = True
    assert found.entropy is not None
    assert found.logp[bad].isnan().all() and found.entropy[bad].isnan().all()
    assert same(found, tuple(x[~bad] for x in clean if x is not None), ~bad)


def test_nothing(steps: Steps):
    z, y = torch.empty(0, 7, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    found = steps.logit_stats(z, y, None, 1.0, entropy=True)
    assert all(stat is not None and stat.shape == (0,) for stat in found)
    steps.logit_gradient(found.logp, None, None, z, y, found, None, 1.0, out=z)


def test_columns_apart_are_refused(steps: Steps):
    z, y = case(7, 7, torch.float32)
    with pytest.raises(ValueError, match="adjacent columns"):
        steps.logit_stats(z.t(), y, None, 1.0)


def test_offsets_beyond_32_bits(steps: Steps):
    """Rows 2^30 elements apart; memory that is not touched is not there."""
    apart, vocab = 2**30 + 8, 50
    try:
        storage = torch.empty(3 * apart, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("no room for 6 GB of addresses")
    z, y = case(3, vocab, torch.bfloat16)
    far = storage.as_strided((3, vocab), (apart, 1))
    far.copy_(z)
    found, want = (steps.logit_stats(each, y, None, 1.0, entropy=True) for each in (far, z))
    assert same(found, want)
    for each in (far, z):
        steps.logit_gradient(torch.ones_like(want.logp), None, None, each, y, want, None, 1.0, out=each)
    assert torch.equal(far, z)
