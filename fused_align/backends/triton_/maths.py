"""What several kernels compute per number: functions that Triton lacks, or lacks in the interpreter."""

import math

import triton
import triton.language as tl

from ..operands import LN2 as LN2_
from ..operands import LOG2E as LOG2E_
from . import interpreted

LN2 = tl.constexpr(LN2_)
LOG2E = tl.constexpr(LOG2E_)
INF = tl.constexpr(math.inf)
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def rounded(x, TYPE: tl.constexpr):
    """x in another dtype, to the nearest. (The interpreter cuts off what bfloat16 has no room for.)"""
    if INTERPRETED and tl.bfloat16 == TYPE and x.dtype != tl.bfloat16:
        x = x.to(tl.float32)
        bits = x.to(tl.uint32, bitcast=True)
        nearest = (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)
    return x.to(TYPE)


@triton.jit
def clamped(x, low, high):
    """torch.clamp: NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def expm1(x):
    """exp(x) - 1 with its digits near 0.

    Kahan: the rounding of u = exp(x) cancels in (u - 1) / log(u). Triton has no expm1, and libdevice
    is not to be had in the interpreter.
    """
    u = tl.exp(x)
    plain = (u == 1.0) | (u == 0.0) | (u > 1e30)  # where log(u) is of no use
    y = (u - 1.0) * (x / tl.log(tl.where(plain, 2.0, u)))
    return tl.where(u == 1.0, x, tl.where(plain, u - 1.0, y))


@triton.jit
def log1p(x):
    """log(1 + x) with its digits near 0, for x in [0, 1]; Kahan's way again."""
    u = 1.0 + x
    none = u == 1.0
    return tl.where(none, x, tl.log(u) * (x / tl.where(none, 1.0, u - 1.0)))


@triton.jit
def sigmoid(x):
    """s(x), with its relative precision on both sides."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def softplus(x):
    """log(1 + e^x)."""
    return tl.where(x > 0.0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def log_sigmoid(x):
    return -softplus(-x)


@triton.jit
def finite_exp(x):
    """losses.policy.finite_exp: exp(min(x, 60)), and its derivative, 0 above."""
    y = tl.exp(tl.where(x > 60.0, 60.0, x))
    return y, tl.where(x <= 60.0, y, 0.0)


@triton.jit
def capped(x):
    """tanh x, and 1 - tanh^2 x, both to the last digits but one."""
    # near 0, where the formula by exponentials cancels, tanh is its series
    NEAR: tl.constexpr = 0.02 if x.dtype == tl.float64 else 0.25  # pyright: ignore
    e = tl.exp(-2 * tl.abs(x))
    ratio = (1 - e) / (1 + e)
    q = x * x
    series = 1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835 - q * (1382 / 155925)))))
    tanh = tl.where(tl.abs(x) < NEAR, x * series, tl.where(x < 0, -ratio, ratio))
    return tanh, 4 * e / ((1 + e) * (1 + e))


@triton.jit
def finish(z, ref, total):
    """z, ref, S of rows, float64 -> logp, 1 - p_y, 1/Z, offset.

    offset turns an exponent into (z_v - z_y) log2 e; what 2^-offset is to the target, E is to the others.
    """
    offset = ref - z * LOG2E
    logp = -softplus(tl.log(total) + offset * LN2)
    inverse = 1 / (total + tl.exp2(-offset))
    return logp, total * inverse, inverse, offset
