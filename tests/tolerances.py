"""The one tolerance table. A number here is never loosened to make a test pass.

Two rules. A bound that must hold: `check_logp`, `check_grad`, `check_loss`, by the dtype of the operands.
And, where the dtype itself limits what anybody can reach (16-bit operands, huge logits), `check_like_torch`:
at most twice the error that plain torch makes in the same dtype, plus the bound above.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: |got - want| <= LOGP * max(1, |want|), per token
LOGP = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
#: ||got - want|| <= GRAD * ||want||, and max|got - want| <= GRAD * max|want|
GRAD = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
#: |got - want| <= LOSS * max(1, |want|), a scalar
LOSS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
#: logits of 16-bit operands at precision="high" (two 16-bit parts): per token, times the largest |logit|
SPLIT_LOGITS = 2e-5
#: relative error of 1 - p where p is 1 to the last digit: float32 keeps its relative precision
CONFIDENT = 1e-5
#: central differences in float64 with a step of 1e-6
DIFFERENCE_STEP, DIFFERENCE = 1e-6, 2e-8


def check_logp(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    error = (got.double() - want).abs() / want.abs().clamp(min=1)
    assert got.isfinite().all(), "not finite"
    assert error.numel() == 0 or error.max() <= LOGP[dtype], (
        f"logp off by {error.max():.2e}, bound {LOGP[dtype]}"
    )


def relative_errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """Relative RMS and relative maximum."""
    error = got.double() - want
    if want.numel() == 0:
        return 0.0, 0.0
    rms, peak = float(want.norm()), float(want.abs().max())
    if peak == 0:
        return (0.0, 0.0) if float(error.abs().max()) == 0 else (float("inf"), float("inf"))
    return float(error.norm()) / rms, float(error.abs().max()) / peak


def check_grad(got: Tensor | None, want: Tensor, dtype: torch.dtype, name: str = "gradient") -> None:
    assert got is not None and got.shape == want.shape, f"{name}: shape"
    assert got.isfinite().all(), f"{name}: not finite"
    rms, peak = relative_errors(got, want)
    assert max(rms, peak) <= GRAD[dtype], f"{name} off by {rms:.2e} RMS, {peak:.2e} max; bound {GRAD[dtype]}"


def check_loss(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    error = float((got.double() - want).abs() / want.abs().clamp(min=1))
    assert error <= LOSS[dtype], f"loss {float(got)} should be {float(want)}: off by {error:.2e}"


def check_like_torch(got: Tensor, want: Tensor, plain: Tensor, dtype: torch.dtype, name: str) -> None:
    """want: float64 truth; plain: what torch gives in the operation's dtype."""
    assert got.isfinite().all(), f"{name}: not finite"
    for kind, ours, theirs in zip(
        ("RMS", "max"), relative_errors(got, want), relative_errors(plain, want), strict=True
    ):
        assert ours <= 2 * theirs + GRAD[dtype], f"{name}: {kind} error {ours:.2e}, torch {theirs:.2e}"
