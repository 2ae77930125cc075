"""Which plan runs, and in what sizes: the least estimated time within a byte budget.

    plan       when                                         GEMM passes    held at once
    score      no gradient                                  1              one tile [rows, cols]
    fused      no gradient, in one kernel (triton)          1              partial sums
    jacobian   the head is frozen                           1 + 1          one tile; E @ W of every row
    single     coefficients known per token (align_loss)    1 + d f        E of a chunk of rows [rows, V]
    window     coefficients known per sequence or pair      1 + d f        E of a chunk of whole items
    recompute  everything else, or too small a budget       1 + (1 + d) f  one tile

d counts the gradient GEMMs (2, or 1 where the head or hidden is frozen), f is the share of live rows whose
coefficient is not zero: the others are dropped before the gradient GEMMs. A pass is 2 N V H FLOP.

`single` and `window` are one mechanism: a chunk of whole items whose exponentials stay until its gradient
GEMMs have run; an item that does not fit is recomputed. A 16-bit dweight is summed in float32: by `recompute`
one slice of the vocabulary after the other, which holds dhidden in float32 meanwhile, or takes one more pass
for dhidden alone where that is too much. The result does not depend on the plan beyond rounding.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import backends
from ..backends.operands import HALF
from ..backends.torch_ import GATHER_BYTES as STEP_BYTES
from ..backends.torch_ import SPARE, SQUARED_COLS

BY_NAME = ("fused",)  # plans that "auto" leaves alone: nobody has measured where it wins
PLANS = ("auto", "score", "fused", "jacobian", "single", "window", "recompute")
MIB = 1 << 20

# A tile that stays in a CPU's cache between the GEMM and the passes over it; on a GPU, one that fills it.
TILE_BYTES = {"cpu": 8 * MIB, "cuda": 128 * MIB}
CACHE_BYTES = {"cpu": 8 * MIB, "cuda": 32 * MIB}  # what a pass leaves there for the next one
LEAST_BUDGET = 256 * MIB  # the default of a GPU whose few rows would do with less, in many small launches
MAX_ROWS = {"cpu": 2048, "cuda": 8192}
MIN_ROWS, MIN_COLS = 32, 256  # the smallest tile worth a GEMM; a budget below it is raised to it
MIN_CHUNK = 32  # complete rows of the smallest chunk
ROW_BYTES = 256  # the vectors of a chunk's rows: sums, coefficients, float64 in between
GATHER_BYTES = 3 * STEP_BYTES  # gathered weight rows and the products with them, see backends.torch_

# What the choice between plans rests on, per device: FLOPs of a GEMM in the time that one byte takes to or
# from memory, of float32 and of 16-bit operands; the rows of a chunk, and elements of a tile, at which a GEMM
# runs at half its speed. (The bytes that passes over a tile amount to are the backend's.)
FLOPS_PER_BYTE = {"cpu": (10.0, 40.0), "cuda": (12.0, 184.0)}
# the fused kernel's product, by bytes of an operand, as a share of the vendor's: estimates until measured
FUSED_SPEED = {2: 0.8, 4: 0.4}
LIVE_SHARE = 0.9  # f, where a loss may clip tokens away: how many is not known before the forward
HALF_SPEED_ROWS = {"cpu": 4, "cuda": 256}
HALF_SPEED_TILE = {"cpu": 0, "cuda": 1 << 20}


@dataclass(frozen=True)
class Problem:
    """What the planner reads: sizes, dtypes, which gradients are needed, when coefficients are known."""

    rows: int  # live rows
    given: int  # rows of hidden, ignored ones included
    hidden: int  # H
    vocab: int  # V
    work: torch.dtype  # of logits and sums
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    operand: torch.dtype | None  # GEMM operands are rounded to this first (autocast)
    rounded: bool  # precision="bf16"
    device: torch.device
    grad_hidden: bool
    grad_head: bool  # weight or bias
    backend: str = "torch"
    capped: bool = False
    entropy: bool = False  # forward
    average: bool = False
    entropy_grad: bool = False
    average_grad: bool = False  # of the mean logit (label smoothing)
    squares: bool = False  # sum of p^2 (WPO)
    main_grad: bool = False
    scale_known: bool = False  # grad_scale: what the loss will be multiplied by
    static: bool = False  # max_live: nothing is read back from the device
    sparse: bool = False  # whether the loss may give tokens a coefficient of exactly 0
    adjacent: bool = True  # the columns of hidden and weight
    coupling: str | None = None  # "token" | "sequence" | "pair": what is known together; None: all at the end
    sizes: tuple[int, ...] = ()  # live tokens of each sequence or pair

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    @property
    def low(self) -> bool:
        """Whether the gradient GEMMs multiply bfloat16."""
        return gemm_dtype(self) == torch.bfloat16

    @property
    def rounds(self) -> bool:
        """Whether dweight is summed in another dtype than it is returned in."""
        return self.grad_head and not self.main_grad and self.weight_dtype != self.work

    @property
    def masked(self) -> bool:
        """Whether live rows must be gathered."""
        return self.rows != self.given or self.static

    @property
    def gathered(self) -> bool:
        return self.masked or self.coupling in ("sequence", "pair") or self.hidden_dtype != self.work

    @property
    def row(self) -> int:
        """Elements from one row of complete exponentials to the next, which begins at 16 bytes or more."""
        return -(-self.vocab // 8) * 8

    def spilled(self, rows: int) -> int:
        """Rows of items that are too large for a chunk of `rows`."""
        return sum(size for size in self.sizes if size > rows)

    @property
    def extra_tiles(self) -> int:
        """Scratch tiles that the steps use besides that of the logits."""
        mixed = self.entropy or self.entropy_grad or (self.average_grad and self.capped)
        return backends.steps(self.backend).extra_tiles(self.capped, mixed)

    def scratch(self, plan: str, rows: int, cols: int) -> tuple[int, int, int]:
        """Bytes of scratch: tiles, parts of 16-bit products, complete rows."""
        if plan == "fused":
            return 0, 0, 0
        size, area, complete = self.work.itemsize, rows * cols, plan in COMPLETE
        tiles = size * area * (1 + self.extra_tiles)
        if self.low:
            tiles += 2 * area  # a tile rounded for the gradient GEMMs
        spare = (
            SPARE * max(area, rows * self.hidden, cols * self.hidden) + 256 if self.low and self.on_cpu else 0
        )
        kept = rows * self.row * gemm_dtype(self).itemsize if complete else 0
        return _whole(tiles), _whole(spare), kept

    def bytes(self, plan: str, rows: int, cols: int, apart: bool = False) -> int:
        """The peak of a plan with chunks of `rows` and tiles of `cols`, beyond inputs and outputs."""
        size, H = self.work.itemsize, self.hidden
        chunks, low = rows < self.rows, self.low
        x, operand = self.operand or self.hidden_dtype, self.operand or self.weight_dtype
        needed = sum(self.scratch(plan, rows, cols)) + ROW_BYTES * rows
        needed += (2 if low else size) * rows * H * (self.gathered or self.operand is not None)  # x
        if plan == "fused":
            return needed + backends.steps(self.backend).fused_bytes(self, rows)
        needed += size * cols * H * (operand != self.work and not low)  # weight, cast
        needed += 2 * cols * H * (operand != self.weight_dtype)  # and rounded first
        if {x, operand} & {*HALF} and not self.on_cpu:
            needed += size * max(rows * cols, rows * H, cols * H)  # what a GEMM gives before it is added
        needed += min(GATHER_BYTES, 3 * size * rows * H)
        needed += 2 * 8 * rows * min(cols, SQUARED_COLS) * self.squares
        if plan in (*COMPLETE, "recompute"):
            # dhidden of the chunk; rows scaled by coefficients, and rounded
            needed += size * rows * H * (self.gathered + 1) + 2 * rows * H * low
            if self.rounds and not self.holds_sum(plan, rows):
                needed += size * cols * H  # the sum of a slice of dweight
        if plan == "jacobian":
            needed += size * rows * H * 2 * self.gathered  # product and dhidden of the chunk
        if self.holds_sum(plan, rows):
            needed += size * self.vocab * H
        if plan in COMPLETE and self.hidden_dtype == torch.float16 and not self.scale_known:
            needed += size * self.given * H  # float32 until backward, as in `holds_sum`
        if plan == "recompute" and chunks and not apart:
            needed += self.waiting
        return needed

    def holds_sum(self, plan: str, rows: int) -> bool:
        """Whether a sum [V, H] of dweight is held, in the dtype of the logits.

        Over the chunks; or until backward, whose upstream gradient may lift it into float16's range.
        """
        late = self.weight_dtype == torch.float16 and not self.scale_known
        return plan in COMPLETE and self.rounds and (rows < self.rows or late)

    @property
    def waiting(self) -> int:
        """Bytes of dhidden that wait for the last slice of dweight, in recompute."""
        held = self.rounds and self.grad_hidden and self.gathered
        return self.work.itemsize * self.rows * self.hidden * held

    def passes(self, plan: str, rows: int, apart: bool = False) -> tuple[float, float]:
        """GEMM passes for logits and for gradients, every coefficient taken as live."""
        gradients = self.grad_hidden + self.grad_head
        if plan in ("score", "fused"):
            return 1, 0
        if plan == "jacobian":
            return 1, 1
        again = 1.0 if plan == "recompute" else self.spilled(rows) / max(self.rows, 1)
        return 1 + again + apart, gradients

    def cost(self, plan: Plan) -> float:
        """Estimated time in units of one GEMM pass over all live rows."""
        kind = "cpu" if self.on_cpu else "cuda"
        logits, gradients = self.passes(plan.name, plan.rows, plan.apart)
        if self.sparse and plan.name != "jacobian":
            logits, gradients = 1 + LIVE_SHARE * (logits - 1), LIVE_SHARE * gradients
        if self.low and self.on_cpu and not self.rounded:
            logits *= 2  # a second product for what the first one's rounding lost
        byte = FLOPS_PER_BYTE[kind][self.low] / (2 * max(self.rows, 1) * self.vocab * self.hidden)
        chunks = -(-self.rows // plan.rows)
        weight = self.vocab * self.hidden
        moved = (logits + gradients) * chunks * weight * self.weight_dtype.itemsize
        if plan.name == "fused":
            return logits / FUSED_SPEED[self.weight_dtype.itemsize] + byte * moved
        moved += logits * self.rows * self.vocab * backends.steps(self.backend).EXP_BYTES[kind]
        kept = plan.rows * self.vocab * gemm_dtype(self).itemsize
        if plan.name in COMPLETE and kept > CACHE_BYTES[kind]:  # written once, read by every gradient GEMM
            moved += (1 + gradients) * kept * chunks
        size = self.work.itemsize * self.hidden
        if plan.name in ("jacobian", "recompute") and plan.rows * size > CACHE_BYTES[kind]:
            # what is summed of a chunk is read and written for every tile
            moved += 2 * size * self.rows * self.grad_hidden * -(-self.vocab // plan.cols)
        if self.grad_head and not (self.rounds and plan.name == "recompute"):
            moved += 2 * chunks * weight * self.work.itemsize  # dweight is read and written
        slow = 1 + HALF_SPEED_ROWS[kind] / plan.rows + HALF_SPEED_TILE[kind] / (plan.rows * plan.cols)
        return (logits + gradients) * slow + byte * moved


COMPLETE = ("single", "window")  # plans that keep E of complete rows


@dataclass(frozen=True)
class Plan:
    name: str
    rows: int  # of a chunk
    cols: int  # of a tile of the vocabulary
    apart: bool = False  # recompute: dhidden and dweight in walks of their own


@dataclass(frozen=True)
class Candidate:
    """A plan as the planner sees it: its sizes and estimates, or why it cannot serve."""

    name: str
    plan: Plan | None
    reason: str = ""
    passes: float = 0.0
    cost: float = 0.0  # in GEMM passes
    nbytes: int = 0


def gemm_dtype(problem: Problem) -> torch.dtype:
    """What the gradient GEMMs multiply: bfloat16 where both operands are, else the dtype of the logits.

    (float16 lacks the range of the exponentials, and is cast.)
    """
    x = problem.operand or problem.hidden_dtype
    weight = problem.operand or problem.weight_dtype
    return torch.bfloat16 if x == weight == torch.bfloat16 else problem.work


def budget(workspace_bytes: int | None, problem: Problem) -> int:
    """The byte budget: the argument, else FUSED_ALIGN_WORKSPACE_BYTES, else what the fast plan needs."""
    if workspace_bytes is None:
        given = os.environ.get("FUSED_ALIGN_WORKSPACE_BYTES", "")
        if given and not given.isdecimal():
            raise ValueError(f"FUSED_ALIGN_WORKSPACE_BYTES must be a number of bytes; got {given!r}.")
        workspace_bytes = int(given) if given else None
    if workspace_bytes is not None:
        if workspace_bytes <= 0:
            raise ValueError(f"workspace_bytes must be positive; got {workspace_bytes}.")
        return workspace_bytes
    if problem.on_cpu:
        return 256 * MIB
    fast = problem.bytes("single", min(problem.rows, 4096), 4096)
    total = (
        torch.cuda.get_device_properties(problem.device).total_memory if problem.device.type == "cuda" else 0
    )
    return min(max(fast, LEAST_BUDGET), total // 16) if total else fast


def check_plan(plan: str) -> None:
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {list(PLANS)}; got {plan!r}.")


def choose(problem: Problem, plan: str = "auto", workspace_bytes: int | None = None) -> Plan:
    """The plan and its sizes. Where no gradient is needed that is score, whatever plan would form them.

    Raises:
        ValueError: no such plan, or the plan asked for cannot serve, with the reason.
    """
    check_plan(plan)
    available = budget(workspace_bytes, problem)
    if not (problem.grad_hidden or problem.grad_head) and plan not in ("auto", "fused"):
        plan = "score"
    if plan != "auto":
        found = candidate(plan, problem, available)
        if found.plan is None:
            raise ValueError(f"plan={plan!r} cannot serve this call: {found.reason}.")
        return found.plan
    able = [c.plan for c in candidates(problem, available) if c.plan is not None and c.name not in BY_NAME]
    return min(able, key=problem.cost)


def candidates(problem: Problem, available: int) -> list[Candidate]:
    return [candidate(name, problem, available) for name in PLANS[1:]]


def candidate(name: str, problem: Problem, available: int) -> Candidate:
    """The plan `name` with the sizes it would take within `available` bytes."""
    reason = _unfit(name, problem)
    plan = None if reason else _sized(name, problem, available)
    if plan is None:
        return Candidate(name, None, reason or _too_small(name, problem, available))
    return Candidate(
        name,
        plan,
        passes=sum(problem.passes(name, plan.rows, plan.apart)),
        cost=problem.cost(plan),
        nbytes=problem.bytes(name, plan.rows, plan.cols, plan.apart),
    )


def _unfit(plan: str, problem: Problem) -> str | None:
    """Why a plan could not serve with any budget."""
    grad = problem.grad_hidden or problem.grad_head
    if plan in ("score", "fused") and grad:
        return f"{plan} computes no gradients, and some are needed"
    if plan == "score":
        return None
    if plan == "fused":
        return backends.steps(problem.backend).why_not_fused(problem)
    if not grad:
        return f"nothing needs a gradient, so {plan} has nothing to do that score does not"
    if plan == "recompute":
        return None
    if plan == "jacobian":
        if problem.grad_head:
            return "jacobian serves a frozen head only, and the weight or bias needs a gradient"
        if problem.entropy_grad:
            return "jacobian does not hold what the entropy's gradient needs; use recompute"
    elif problem.coupling is None:
        return f"{plan} needs coefficients that are known in the forward: call align_loss"
    elif problem.coupling == "batch":
        return f"the loss couples the whole batch, so {plan} could form no gradient before its end"
    elif plan != ("single" if problem.coupling == "token" else "window"):
        wanted = "single" if problem.coupling == "token" else "window"
        return f"the loss couples a {problem.coupling}, whose plan is {wanted!r}"
    elif problem.main_grad and not problem.scale_known:
        return (
            f"{plan} adds to main_grad in the forward, so it must know what the loss will be multiplied by: "
            "pass grad_scale (1.0 if by nothing)"
        )
    elif problem.low and problem.entropy_grad:
        return f"{plan} keeps bfloat16 exponentials, too few digits for the entropy's gradient; use recompute"
    elif plan == "window" and problem.static:
        return "window needs the lengths of the sequences on the host, and max_live forbids to read them"
    if problem.capped and (problem.average_grad or problem.entropy_grad):
        return (
            f"{plan} does not hold what label smoothing or the entropy needs under a softcap; use recompute"
        )
    return None


def _too_small(plan: str, problem: Problem, available: int) -> str:
    rows = _least_rows(problem)
    least = problem.bytes(plan, rows, _least_cols(problem))
    what = f"{rows} tokens" + (f" (one {problem.coupling} or more)" if problem.sizes else "")
    return f"{plan} needs workspace_bytes >= {least} to hold all exponents of {what}; got {available}"


def _sized(name: str, problem: Problem, available: int) -> Plan | None:
    """The sizes of a plan within `available` bytes that cost the least of those looked at: chunks of all rows
    and of fewer, with tiles as wide as fit beside them. A smallest tile where nothing fits.

    None where complete rows of not one item fit.
    """
    best, lowest = None, math.inf
    for rows in _row_counts(name, problem, available):
        for apart in _ways(name, problem, rows):
            if problem.cost(Plan(name, rows, _cols(problem, rows), apart)) >= lowest:
                continue  # were there memory enough for the widest tiles
            plan = _tiled(name, problem, rows, available, apart)
            if plan is not None and problem.cost(plan) < lowest:
                best, lowest = plan, problem.cost(plan)
    if best is not None or name in COMPLETE:
        return best
    least = min(max(problem.rows, 1), MIN_ROWS)
    ways = [Plan(name, least, _least_cols(problem), apart) for apart in _ways(name, problem, least)]
    return min(ways, key=lambda plan: problem.bytes(name, plan.rows, plan.cols, plan.apart))


def _row_counts(name: str, problem: Problem, available: int) -> list[int]:
    """The rows that a chunk may have, the most first; in plans with complete rows none that do not fit."""
    rows = max(1, min(problem.rows, _most_rows(problem)))
    if name not in COMPLETE:
        some = {max(rows >> halved, min(rows, MIN_ROWS)) for halved in range(rows.bit_length())}
    else:  # beside tiles of several widths
        widths = (_least_cols(problem) << steps for steps in (0, 2, 4, 6))
        some = {_chunk_rows(problem, name, available, cols) for cols in widths} - {0}
    if name == "window":
        some = {_filled(problem, each) for each in some}
    else:  # even chunks: a short last one wastes a pass over the weight
        some = {max(1, -(-problem.rows // max(1, -(-problem.rows // each)))) for each in some}
    return sorted(some, reverse=True)


def _filled(problem: Problem, rows: int) -> int:
    """The tokens of the fullest chunk, where chunks are of whole items and of at most so many rows.

    All of them where an item is larger: it is walked in pieces of so many.
    """
    fullest = filled = 0
    for size in problem.sizes if not problem.spilled(rows) else ():
        filled = filled + size if filled + size <= rows else size
        fullest = max(fullest, filled)
    return fullest or rows


def _ways(name: str, problem: Problem, rows: int) -> tuple[bool, ...]:
    """Whether dhidden may be formed apart, by one more pass, and not wait for the last slice of dweight."""
    waits = name == "recompute" and rows < problem.rows and problem.waiting > 0
    return (False, True) if waits else (False,)


def _tiled(name: str, problem: Problem, rows: int, available: int, apart: bool) -> Plan | None:
    """The plan with tiles as wide as fit; None where not the narrowest does."""
    most = _cols(problem, rows)

    def fits(steps: int) -> bool:  # rows of a tile begin aligned
        return problem.bytes(name, rows, min(steps * MIN_COLS, most), apart) <= available

    steps = -(-most // MIN_COLS)
    if not fits(steps):
        if not fits(1):
            return None
        steps = _most(1, steps, fits)
    return Plan(name, rows, min(steps * MIN_COLS, most), apart)


def _chunk_rows(problem: Problem, plan: str, available: int, cols: int) -> int:
    """The most complete rows that fit beside a tile of `cols`, 0 if there are none that are of use."""
    cols = min(cols, problem.vocab)

    def fits(rows: int) -> bool:
        return problem.bytes(plan, rows, cols) <= available

    least = _least_rows(problem)
    most = max(least, min(problem.rows, _most_rows(problem)), 1)
    if problem.sizes:  # whole items: the largest one may be larger than a chunk should be
        most = max(most, min(max(problem.sizes), problem.rows))
    if problem.rows and not fits(least):
        return most if fits(most) else 0  # all in one chunk need no sum of dweight
    rows = most if fits(most) else _most(least, most, fits)
    return 0 if problem.sizes and problem.spilled(rows) == problem.rows > 0 else rows


def _most(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest of low to high that fits; low does, and so does what is less than what does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _least_rows(problem: Problem) -> int:
    """The fewest complete rows worth a chunk: at least one item."""
    return min(problem.rows, max(MIN_CHUNK, min((size for size in problem.sizes if size), default=0)))


def _most_rows(problem: Problem) -> int:
    return MAX_ROWS.get(problem.device.type, 8192)


def _least_cols(problem: Problem) -> int:
    return min(problem.vocab, MIN_COLS)


def _cols(problem: Problem, rows: int) -> int:
    tile = TILE_BYTES.get(problem.device.type, 128 * MIB) // (problem.work.itemsize * rows)
    return min(problem.vocab, max(MIN_COLS, tile // 256 * 256))


def _whole(nbytes: int) -> int:
    """Rounded up, so that what follows is aligned."""
    return -(-nbytes // 64) * 64
