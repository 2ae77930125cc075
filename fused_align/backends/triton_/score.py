"""The sums of exponentials of x @ W^T in one kernel: the logits stay in registers.

For row t with raw logits a (bias added) and reference ref, see `fused_align.backends.operands`,

    E_tv = 2^(gain cap(a_tv) - ref_t), the target's column 0        S_t = sum_v E_tv

and, for entropies, sum_v E_tv (x_tv + pivot_t) of the exponents x. A row whose sum over a tile is beyond
2^CEILING moves its reference to the tile's maximum, by a whole number: what was summed so far is scaled by a
power of two, exactly, and the tile's exponents are formed again from its logits.

The grid is fixed. A program takes work items in turn; an item is a block of rows and a group of tiles of the
vocabulary, walked in order, and leaves one partial sum per row. A second kernel adds the groups up, in order.
Which tiles form a group follows from the size of the vocabulary, the dtype and the device: what is found for
a row depends on the row alone, bit by bit, and not on how many there are or what stands beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.cache import get_cache_manager
from triton.tools.tensor_descriptor import TensorDescriptor

from ..operands import CEILING, LOG2E
from . import interpreted, on_device, tuning
from . import why_not as why_not_triton

_HIGHEST = tl.constexpr(2.0**CEILING)
_NEVER = tl.constexpr(-1000.0)  # the exponent of what does not count: 2^-1000 is 0 in float32
_TWICE = tl.constexpr(-2 * LOG2E)


@dataclass(frozen=True)
class Config:
    """Sizes of the kernel on one kind of device."""

    rows: int  # of a tile
    cols: int
    depth: int  # of the hidden size at a time
    warps: int
    stages: int
    band: int = 16  # blocks of rows that walk the vocabulary together, for the L2 cache
    programs: int = 4  # of the grid; on a GPU one for each of its multiprocessors


# By the architecture (80: all with about 100 KB of shared memory too), the bytes of an operand and what else
# is held in registers: "plain", "entropy", "bias", or "odd" where rows are not a multiple of 16 bytes apart.
# None of these spills registers; tests/aot_score.py has the cases. float32 does without tensor cores, which
# would round the operands.
_SINGLE = Config(64, 64, 16, 8, 3)
_ODD = Config(64, 128, 32, 8, 3)
CONFIGS: dict[tuple[int, int, str], Config] = {
    (80, 2, "plain"): Config(128, 128, 64, 8, 3),
    (80, 2, "entropy"): Config(64, 128, 64, 8, 3),
    (80, 2, "bias"): Config(64, 128, 64, 8, 3),
    (90, 2, "plain"): Config(128, 256, 64, 8, 4),
    (90, 2, "entropy"): Config(128, 256, 64, 8, 4),
    (90, 2, "bias"): Config(128, 128, 64, 8, 4),
    (100, 2, "plain"): Config(128, 256, 64, 8, 4),
    (100, 2, "entropy"): Config(128, 128, 64, 8, 4),
    (100, 2, "bias"): Config(128, 128, 64, 8, 4),
    **{(arch, 2, "odd"): _ODD for arch in (80, 90, 100)},
    **{(arch, 4, kind): _SINGLE for arch in (80, 90, 100) for kind in ("plain", "entropy", "bias", "odd")},
    (100, 4, "odd"): Config(64, 64, 16, 4, 3),
}
INTERPRETED = Config(16, 64, 32, 1, 1, band=2)  # many tiles and groups in small problems

# What FUSED_ALIGN_TUNE=1 tries besides, where it fits into the shared memory of a block
OTHERS = tuple(
    Config(rows, cols, depth, warps, stages)
    for rows, cols, warps in (
        (64, 128, 4),
        (64, 256, 4),
        (128, 128, 4),
        (128, 128, 8),
        (128, 256, 8),
        (256, 128, 8),
    )
    for depth, stages in ((32, 4), (64, 3), (64, 4), (128, 3))
)
SHARED = {80: 99 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes; sm_86, sm_89 and sm_120 count as 80
SPARE = 8 << 10  # of that, for what the compiler puts beside the operands
SAMPLE = 4096  # rows that are timed, however many there are


@triton.jit
def _tanh(x):
    """tanh in float32; near 0 by its series, for the digits."""
    e = tl.exp2(tl.abs(x) * _TWICE)
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
    IN_PYTHON: tl.constexpr,
):
    """Sum of the exponentials of a tile, and of their products with exponent + pivot, [m] each."""
    col = first + tl.arange(0, a.shape[1])
    x = tl.fma(a, gain[:, None], -ref[:, None])
    x = tl.where((col[None, :] == y[:, None]) | (col >= vocab)[None, :], _NEVER, x)
    if MOMENT:
        x = tl.where(x < _NEVER, _NEVER, x)  # -inf, of a bias: 0 * inf would be NaN
    if IN_PYTHON:
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


@triton.jit(do_not_specialize=["n"])
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
    IN_PYTHON: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    entropy: tl.constexpr = pivot is not None  # pyright: ignore
    program, programs = tl.program_id(0), tl.num_programs(0)
    blocks = tl.cdiv(n, ROWS)
    turns = (blocks * groups - program + programs - 1) // programs
    y = tl.full((ROWS,), -1, tl.int32)
    r, total, g = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    p, moment = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float64)
    done = 0
    for unit in tl.range(0, turns * PER, flatten=True):
        at = program + unit // PER * programs
        block, group = _place(at, blocks, groups, BAND)  # pyright: ignore
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
            if IN_PYTHON:  # which gets products of bfloat16 wrong
                left, right = left.to(tl.float32), right.to(tl.float32)
            acc = tl.dot(left, right.T, acc, input_precision="ieee")

        # The compiler makes one loop of these two, so that the next tile is loaded while this one is summed
        # up. What follows then wants counters of its own.
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
            found, distance = _sums(acc, first, vocab, y, g, r, p, entropy, IN_PYTHON)
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
            again, apart = _sums(acc, first, vocab, y, g, r, p, entropy, IN_PYTHON)
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
        done += 1  # noqa: SIM113


@triton.jit(do_not_specialize=["n"])
def _combine_kernel(
    totals,  # [groups, n]
    refs,  # [groups, n]
    moments,  # [groups, n] float64 | None
    start,  # [n], the references before
    pivot,  # [n] float64 | None
    out_total,  # [n] out
    out_ref,  # [n] out
    out_moment,  # [n] float64 out | None
    out_pivot,  # [n] float64 out | None
    n,
    groups,
    ROWS: tl.constexpr,
):
    """Adds the groups up, in their order, against the largest of their references."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < n
    first = tl.load(start + row, mask=known, other=0.0)
    ref, place = first, row
    for _ in range(groups):
        ref = tl.maximum(ref, tl.load(refs + place, mask=known, other=0.0))
        place += n
    total, moment = tl.zeros((ROWS,), tl.float64), tl.zeros((ROWS,), tl.float64)
    if moments is not None:
        given = tl.load(pivot + row, mask=known, other=0.0)
        around = tl.where(ref == first, given, 0.0)
        tl.store(out_pivot + row, around, mask=known)
    place = row
    for _ in range(groups):
        own = tl.load(refs + place, mask=known, other=0.0)
        down = _half_power(ref - own).to(tl.float64)
        part = tl.load(totals + place, mask=known, other=0.0).to(tl.float64)
        total += part * down
        if moments is not None:
            # the group's exponents are from its own reference, and its pivot was rounded, or 0 after a jump
            rounded = tl.where(own == first, given.to(tl.float32), 0.0).to(tl.float64)
            shift = (own - ref).to(tl.float64) + around - rounded
            moment += (tl.load(moments + place, mask=known, other=0.0) + shift * part) * down
        place += n
    tl.store(out_total + row, total.to(tl.float32), mask=known)
    tl.store(out_ref + row, ref, mask=known)
    if moments is not None:
        tl.store(out_moment + row, moment, mask=known)


def why_not(x: Tensor, weight: Tensor) -> str | None:  # [n, H], [V, H]
    """None where `fused_score` takes these operands, else the reason."""
    reason = why_not_triton(x.device)
    if reason is not None:
        return reason
    if x.dtype != weight.dtype:
        return f"it multiplies operands of one dtype; got {x.dtype} and {weight.dtype}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it multiplies float32, bfloat16 or float16; got {x.dtype}"
    if max(x.stride(1), weight.stride(1)) != 1 and x.shape[1] > 1:
        return f"the columns of its operands must be adjacent; got strides {x.stride()} and {weight.stride()}"
    return None


def config(device: torch.device, dtype: torch.dtype, kind: str = "plain") -> Config:
    """The sizes for a device, a dtype of operands, and what else is held in registers (see `CONFIGS`)."""
    if interpreted():
        return INTERPRETED
    return replace(CONFIGS[_arch(device), dtype.itemsize, kind], programs=_processors(device))


_tuned: dict[str, Config] = {}


def tuned(default: Config, x: Tensor, weight: Tensor, kind: str, run: Callable[[Config], object]) -> Config:
    """The fastest of the default and `OTHERS`, timed once and kept in Triton's cache on disk.

    By device, versions, dtype, kind and the sizes of the weight, and not by the number of rows: a row's
    result must not depend on that.
    """
    about = (_name(x.device), triton.__version__, str(x.dtype), kind, *weight.shape)
    key = hashlib.sha256(repr((about, default, OTHERS)).encode()).hexdigest()
    if key not in _tuned:
        store, name = get_cache_manager(key), "score.tuned.json"
        found = store.get_file(name)
        if found is None:
            measure: Any = tuning.timer or triton.testing.do_bench
            fitting = _fitting(default, x.device, x.dtype)
            times = {c: measure(partial(run, c), quantiles=[0.5, 0.2, 0.8])[0] for c in fitting}
            best = min(times, key=times.__getitem__)
            found = store.put(json.dumps({"about": about, "config": asdict(best)}), name, binary=False)
        with open(found) as file:
            _tuned[key] = Config(**json.load(file)["config"])
    return _tuned[key]


def _fitting(default: Config, device: torch.device, dtype: torch.dtype) -> list[Config]:
    """The default and those whose operands, with a tile of sums, fit into shared memory."""
    if interpreted():
        return [default, replace(default, rows=32, cols=32)]
    most, size = SHARED[_arch(device)], dtype.itemsize
    sized = (replace(c, programs=default.programs) for c in OTHERS)
    return [default, *(c for c in sized if (c.rows + c.cols) * c.depth * c.stages * size + SPARE <= most)]


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def _arch(device: torch.device) -> int:
    major = torch.cuda.get_device_capability(device)[0]
    return {9: 90, 10: 100}.get(major, 80)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def split(vocab: int, sizes: Config) -> tuple[int, int]:
    """(groups, tiles of a group): about one group for each program, so that one block of rows feeds all."""
    tiles = -(-vocab // sizes.cols)
    per = -(-tiles // sizes.programs)
    return -(-tiles // per), per


def partial_bytes(rows: int, vocab: int, device: torch.device, dtype: torch.dtype, entropy: bool) -> int:
    """The most that `fused_score` allocates for the sums of its groups, whichever sizes are chosen."""
    default = config(device, dtype)
    groups = max(split(vocab, sizes)[0] for sizes in (default, *_fitting(default, device, dtype)))
    return rows * groups * (16 if entropy else 8)


def fused_score(
    x: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    bias: Tensor | None,  # [V]
    target: Tensor,  # [n] int64
    ref: Tensor,  # [n] float32, whole numbers
    *,
    inner: float,  # factor of the logit inside tanh; used iff capped
    gain: float | Tensor,  # [n]; base-2 exponent per unit of (capped) logit
    capped: bool = False,
    entropy: bool = False,
    pivot: Tensor | None = None,  # [n] float64, with entropy
    sizes: Config | None = None,  # None: those of `config`
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """What a walk over the vocabulary leaves: ref, S [n] float32; with entropy moment, pivot [n] float64.

    The logits are x @ weight^T + bias; see `backends.operands.Chunk` for what the four are. Extra memory:
    `partial_bytes`.

    Raises:
        ValueError: `why_not` gives a reason, or entropy comes without a pivot.
    """
    reason = why_not(x, weight)
    if reason is not None:
        raise ValueError(f"fused_score cannot run: {reason}.")
    if entropy and pivot is None:
        raise ValueError("fused_score: entropy needs a pivot [n] in float64; got None.")
    n, vocab, hidden = x.shape[0], weight.shape[0], x.shape[1]
    even = _aligned(x) and _aligned(weight)
    if sizes is None:
        kind = "bias" if bias is not None else "entropy" if entropy else "plain"
        kind = kind if even else "odd"
        sizes = config(x.device, x.dtype, kind)
        if os.environ.get("FUSED_ALIGN_TUNE") == "1" and n:
            some = torch.arange(SAMPLE, device=x.device) % n
            rows = x[some], weight, bias, target[some], ref[some]
            heat = gain[some] if isinstance(gain, Tensor) else gain
            pivots = None if pivot is None else pivot[some]
            same = {"inner": inner, "gain": heat, "capped": capped, "entropy": entropy, "pivot": pivots}
            sizes = tuned(sizes, x, weight, kind, lambda c: fused_score(*rows, **same, sizes=c))
    groups, per = split(vocab, sizes)
    total, moved = torch.empty_like(ref), torch.empty_like(ref)
    pivot = pivot.contiguous() if entropy and pivot is not None else None
    moment, pivots = (torch.empty_like(pivot), torch.empty_like(pivot)) if pivot is not None else (None, None)
    if n == 0:
        return moved, total, moment, pivots
    totals, refs = (torch.empty(groups, n, dtype=torch.float32, device=x.device) for _ in range(2))
    moments = None if pivot is None else torch.empty(groups, n, dtype=torch.float64, device=x.device)
    ref = ref.contiguous()
    by_tma = even and (interpreted() or _arch(x.device) >= 90)
    with on_device(x.device):
        programs = min(sizes.programs, triton.cdiv(n, sizes.rows) * groups)
        _score_kernel[(programs,)](
            TensorDescriptor.from_tensor(x, [sizes.rows, sizes.depth]) if by_tma else x,
            TensorDescriptor.from_tensor(weight, [sizes.cols, sizes.depth]) if by_tma else weight,
            bias,
            target.contiguous(),
            ref,
            gain.to(torch.float32).contiguous() if isinstance(gain, Tensor) else None,
            pivot,
            totals,
            refs,
            moments,
            float(inner),
            1.0 if isinstance(gain, Tensor) else float(gain),
            n,
            vocab,
            hidden,
            x.stride(0),
            weight.stride(0),
            groups,
            **_constants(sizes, per, capped, by_tma, hidden),
        )
        _combine_kernel[(triton.cdiv(n, 128),)](
            totals, refs, moments, ref, pivot, total, moved, moment, pivots, n, groups, **_COMBINE
        )
    return moved, total, moment, pivots


_COMBINE: dict[str, Any] = {"ROWS": 128, "num_warps": 4}


def _constants(sizes: Config, per: int, capped: bool, by_tma: bool, hidden: int) -> dict[str, Any]:
    return {
        "PER": per,
        "CAPPED": capped,
        "TMA": by_tma,
        "EVEN": hidden % sizes.depth == 0,
        "IN_PYTHON": interpreted(),
        "ROWS": sizes.rows,
        "COLS": sizes.cols,
        "DEPTH": sizes.depth,
        "BAND": sizes.band,
        "num_warps": sizes.warps,
        "num_stages": sizes.stages,
    }


def _aligned(matrix: Tensor) -> bool:
    """Whether each row begins at a multiple of 16 bytes and H fills such units: for TMA and wide loads."""
    size = matrix.element_size()
    return not (matrix.data_ptr() % 16 or matrix.stride(0) * size % 16 or matrix.shape[1] * size % 16)
