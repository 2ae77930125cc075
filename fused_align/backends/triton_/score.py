"""The sums of exponentials of x @ W^T in one kernel: the logits stay in registers.

For row t with raw logits a (bias added) and reference ref, see `fused_align.linear.passes`,

    E_tv = 2^(gain cap(a_tv) - ref_t), the target's column 0        S_t = sum_v E_tv

and, for entropies, sum_v E_tv (x_tv + pivot_t) of the exponents x. A row whose sum over a tile is beyond 2^CEILING
moves its reference to the tile's maximum, by a whole number: what was summed so far is scaled by a power of
two, exactly, and the tile's exponents are formed again from its logits.

The grid is fixed. A program takes work items in turn; an item is a block of rows and a group of tiles of the
vocabulary, walked in order, and leaves one partial sum per row. A second kernel adds the groups up, in order.
Which tiles form a group follows from the size of the vocabulary, the dtype and the device: what is found for
a row depends on the row alone, bit by bit, and not on how many there are or what stands beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

CEILING = 58.0  # base 2, as in linear.passes
_HIGHEST = tl.constexpr(2.0**CEILING)
_NEVER = tl.constexpr(-1000.0)  # the exponent of what does not count: 2^-1000 is 0 in float32
_LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Config:
    """Sizes of the kernel on one device."""

    rows: int  # of a tile
    cols: int
    depth: int  # of the hidden size at a time
    warps: int
    stages: int
    band: int = 16  # blocks of rows that walk the vocabulary together, for the L2 cache
    tma: bool = False  # whether the device has it
    programs: int = 4  # of the grid


# By the kind of device and the bytes of an operand. 80: 163 KB of shared memory; 86 (8.6, 8.9, 12.x): 99 KB;
# 90 and 100: 227 KB and TMA. float32 is multiplied without tensor cores, which would round the operands.
CONFIGS: dict[tuple[int, int], Config] = {
    (80, 2): Config(128, 128, 64, 8, 3),
    (80, 4): Config(64, 128, 16, 8, 3),
    (86, 2): Config(128, 128, 32, 8, 3),
    (86, 4): Config(64, 128, 16, 8, 3),
    (90, 2): Config(128, 256, 64, 8, 4, tma=True),
    (90, 4): Config(64, 128, 16, 8, 3, tma=True),
    (100, 2): Config(128, 256, 64, 8, 4, tma=True),
    (100, 4): Config(64, 128, 16, 8, 3, tma=True),
}
INTERPRETED = Config(16, 64, 32, 1, 1, band=2)  # many tiles and groups in small problems


@triton.jit
def _tanh(x):
    """tanh in float32; near 0 by its series, for the digits."""
    e = tl.exp2(-2.0 * _LOG2E * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    s = x * x
    series = tl.fma(s, 62.0 / 2835.0, -17.0 / 315.0)
    series = tl.fma(s, series, 2.0 / 15.0)
    series = tl.fma(s, series, -1.0 / 3.0)
    return tl.where(s < 0.0625, tl.fma(x * s, series, x), far)


@triton.jit
def _half_power(k):
    """2^-k of whole k >= 0 in float32, exactly; 0 beyond 2^-126."""
    small = tl.minimum(k, 126.0).to(tl.int32)
    return tl.where(k > 126.0, 0.0, ((127 - small) << 23).to(tl.float32, bitcast=True))


@triton.jit
def _place(item, blocks, groups, BAND: tl.constexpr):
    """Block of rows and group of an item: a band of blocks after the other, through all groups."""
    band = item // (BAND * groups)
    first = band * BAND
    width = tl.minimum(blocks - first, BAND)
    rest = item - first * groups
    return first + rest % width, rest // width


@triton.jit
def _halves(a):  # [m, v] -> two of [m, v / 2]
    return tl.split(tl.permute(tl.reshape(a, (a.shape[0], 2, a.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _capped(a, bias, first, vocab, inner, CAPPED: tl.constexpr):
    """Logits [m, v] with their bias, and under the cap: tanh of inner times them."""
    if bias is not None:
        col = first + tl.arange(0, a.shape[1])
        a += tl.load(bias + col, mask=col < vocab, other=0.0).to(tl.float32)[None, :]
    return _tanh(a * inner) if CAPPED else a


@triton.jit
def _sums(
    a,  # [m, v], capped logits
    first,  # column
    vocab,
    y,  # [m]
    gain,  # [m]
    ref,  # [m]
    pivot,  # [m]
    MOMENT: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Sum of the exponentials of a tile, and of their products with exponent + pivot, [m] each."""
    col = first + tl.arange(0, a.shape[1])
    x = tl.fma(a, gain[:, None], -ref[:, None])
    x = tl.where((col[None, :] == y[:, None]) | (col >= vocab)[None, :], _NEVER, x)
    if MOMENT:
        x = tl.where(x < _NEVER, _NEVER, x)  # -inf, of a bias: 0 * inf would be NaN
    if INTERPRETED:
        x = tl.where(x > 118.0, 118.0, x)  # numpy warns of what it rounds to inf; both are beyond
    e = tl.exp2(x)
    moment = tl.sum(e * (x + pivot[:, None]), 1) if MOMENT else pivot
    return tl.sum(e, 1), moment


@triton.jit
def _top(a, first, vocab, gain, ref):
    """The largest exponent of each row; the target's does not matter, 2^58 below those that it is for."""
    valid = (first + tl.arange(0, a.shape[1]) < vocab)[None, :]
    top = tl.max(tl.where(valid, tl.where((gain > 0)[:, None], a, -a), -float("inf")), 1)
    return tl.fma(top, tl.abs(gain), -ref)


@triton.jit
def _score_kernel(
    x,  # [n, H], or its descriptor
    weight,  # [V, H], or its descriptor
    bias,  # [V] | None
    target,  # [n]
    ref,  # [n]
    gain,  # [n] | None
    pivot,  # [n] float64 | None; given for moments
    totals,  # [groups, n] out
    refs,  # [groups, n] out
    moments,  # [groups, n] float64 out | None
    inner,  # factor of a logit inside tanh
    scalar,  # the gain where gain is None
    n,
    vocab,
    hidden,
    x_stride,
    weight_stride,
    groups,
    PER: tl.constexpr,  # tiles of a group
    CAPPED: tl.constexpr,
    TMA: tl.constexpr,
    EVEN: tl.constexpr,  # DEPTH divides hidden
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    entropy: tl.constexpr = pivot is not None
    program, programs = tl.program_id(0), tl.num_programs(0)
    blocks = tl.cdiv(n, ROWS)
    turns = (blocks * groups - program + programs - 1) // programs
    y = tl.full((ROWS,), -1, tl.int32)
    r, total, g = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    p, moment = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float64)
    done = 0
    for unit in tl.range(0, turns * PER, flatten=True):
        block, group = _place(program + unit // PER * programs, blocks, groups, BAND)
        first = (group * PER + unit % PER) * COLS
        acc = tl.zeros((ROWS, COLS), tl.float32)
        near = tl.minimum(block * ROWS + tl.arange(0, ROWS), n - 1).to(tl.int64) * x_stride
        far = tl.minimum(first + tl.arange(0, COLS), vocab - 1).to(tl.int64) * weight_stride
        for step in range(0, tl.cdiv(hidden, DEPTH)):
            if TMA:
                left = x.load([block * ROWS, step * DEPTH])
                right = weight.load([first, step * DEPTH])
            else:
                k = step * DEPTH + tl.arange(0, DEPTH)
                if EVEN:
                    left = tl.load(x + near[:, None] + k[None, :])
                    right = tl.load(weight + far[:, None] + k[None, :])
                else:
                    left = tl.load(x + near[:, None] + k[None, :], mask=(k < hidden)[None, :], other=0.0)
                    right = tl.load(weight + far[:, None] + k[None, :], mask=(k < hidden)[None, :], other=0.0)
            if INTERPRETED:  # which gets products of bfloat16 wrong
                left, right = left.to(tl.float32), right.to(tl.float32)
            acc = tl.dot(left, right.T, acc, input_precision="ieee")

        # The compiler makes one loop of these two, so that the next tile is loaded while this one is summed up.
        # What follows then wants counters of its own.
        block, group = _place(program + done // PER * programs, blocks, groups, BAND)
        row = block * ROWS + tl.arange(0, ROWS)
        known = row < n
        if done % PER == 0:
            wanted = tl.load(target + row, mask=known, other=-1)
            y = tl.where((wanted >= 0) & (wanted < vocab), wanted, -1).to(tl.int32)
            r = tl.load(ref + row, mask=known, other=0.0)
            if gain is None:
                g = tl.zeros((ROWS,), tl.float32) + scalar
            else:
                g = tl.load(gain + row, mask=known, other=0.0)
            total = tl.zeros((ROWS,), tl.float32)
            if entropy:
                p = tl.load(pivot + row, mask=known, other=0.0).to(tl.float32)
                moment = tl.zeros((ROWS,), tl.float64)
        first = (group * PER + done % PER) * COLS
        acc = _capped(acc, bias, first, vocab, inner, CAPPED)
        found, distance = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
        if first < vocab:  # the last group may have less tiles
            found, distance = _sums(acc, first, vocab, y, g, r, p, entropy, INTERPRETED)
        beyond = found > _HIGHEST
        if tl.max(beyond.to(tl.int32), 0) > 0:
            # by tl.where for each row: rows that are not beyond keep what they have to the last bit
            jump = tl.where(beyond, tl.ceil(_top(acc, first, vocab, g, r)), 0.0)
            r += jump
            if entropy:
                moved = tl.where(beyond, 0.0, p)
                moment += (moved - p - jump).to(tl.float64) * total.to(tl.float64)
                moment *= _half_power(jump).to(tl.float64)
                p = moved
            total *= _half_power(jump)
            again, apart = _sums(acc, first, vocab, y, g, r, p, entropy, INTERPRETED)
            found, distance = tl.where(beyond, again, found), tl.where(beyond, apart, distance)
        total += found
        if entropy:
            moment += distance.to(tl.float64)
        if done % PER == PER - 1:
            place = group.to(tl.int64) * n + row
            tl.store(totals + place, total, mask=known)
            tl.store(refs + place, r, mask=known)
            if entropy:
                tl.store(moments + place, moment, mask=known)
        done += 1
