"""Which plan runs, and in what sizes: the fewest GEMM passes that fit a byte budget.

    plan       when                                             GEMM passes   held at once
    score      no gradient                                      1             one tile [rows, cols]
    jacobian   the head is frozen                               2             one tile, and E @ W of every row
    single     coefficients known per token (align_loss)        3             E of a chunk of rows [rows, V]
    window     coefficients known per sequence or pair          3             E of a chunk of whole items
    recompute  everything else, or too small a budget           4             one tile

`single` and `window` are one mechanism: a chunk of whole items whose exponentials stay until its gradient
GEMMs have run. `recompute` with a 16-bit weight finishes one slice of dweight after the other and also holds
dhidden in float32 meanwhile; where that is too much it takes a fifth pass, for dhidden alone. The result does
not depend on the plan beyond rounding.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

PLANS = ("auto", "score", "jacobian", "single", "window", "recompute")
MIB = 1 << 20

# A tile that stays in a CPU's cache between the GEMM and the passes over it; on a GPU, one that fills it.
TILE_BYTES = {"cpu": 8 * MIB, "cuda": 128 * MIB}
MAX_ROWS = {"cpu": 2048, "cuda": 8192}
MIN_ROWS, MIN_COLS = 32, 256  # the smallest tile worth a GEMM; a budget below it is raised to it
MIN_CHUNK = 128  # complete rows: below this the weight is re-read too often, and recompute is cheaper
ROW_BYTES = 256  # the vectors of a chunk's rows: sums, coefficients, float64 in between
GATHER_BYTES = 3 * MIB  # gathered weight rows and the products with them, see backends.torch_
HALF = (torch.bfloat16, torch.float16)


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
    capped: bool = False
    entropy: bool = False  # forward
    entropy_grad: bool = False
    coupling: str | None = (
        None  # "token" | "sequence" | "pair": when coefficients are known; None: at the end
    )
    longest: int = 1  # rows of the largest item

    @property
    def rounds(self) -> bool:
        """Whether dweight is summed in another dtype than it is returned in."""
        return self.grad_head and self.weight_dtype != self.work

    def scratch(self, plan: str) -> int:
        """How many tiles are alive at once: E, tanh^2 under a softcap, exponents where the entropy asks."""
        entropy = self.entropy or (self.entropy_grad and plan == "recompute")
        return 1 + int(self.capped) + int(entropy)

    @property
    def masked(self) -> bool:
        """Whether live rows must be gathered."""
        return self.rows != self.given

    @property
    def _gathered(self) -> bool:
        return self.masked or self.coupling in ("sequence", "pair") or self.hidden_dtype != self.work

    def held(self, plan: str) -> int:
        """Bytes that a plan holds whatever the sizes of its chunks and tiles."""
        size, needed = self.work.itemsize, 0
        if plan in ("single", "window"):
            needed += size * self.vocab * self.hidden * self.rounds  # the sum of dweight
            # which the upstream gradient may lift out of float16's range: it stays float32 until backward
            needed += size * self.given * self.hidden * (self.hidden_dtype == torch.float16)
        if plan == "recompute" and self.rounds and self.grad_hidden:
            needed += size * self.rows * self.hidden * self._gathered  # dhidden, until the last slice is done
        return needed

    def bytes(self, plan: str, rows: int, cols: int) -> int:
        """What a plan needs at a time for chunks of `rows` and tiles of `cols`, on top of what is held."""
        size, H, gathered = self.work.itemsize, self.hidden, self._gathered
        x, operand = self.operand or self.hidden_dtype, self.operand or self.weight_dtype
        needed = size * rows * cols * self.scratch(plan)
        needed += size * rows * H * (gathered or self.operand is not None)  # x
        needed += size * cols * H * (operand != self.work)  # weight, cast
        needed += 2 * cols * H * (operand != self.weight_dtype)  # and rounded first
        if {x, operand} & {*HALF} and (self.rounded or self.device.type == "cuda"):
            # E rounded for the GEMM, and what the GEMM gives before it is added
            needed += 2 * rows * cols + size * max(rows * cols, rows * H, cols * H)
            needed += size * rows * H * (x != operand)  # x, cast to meet the weight
        needed += min(GATHER_BYTES, 3 * size * rows * H) + ROW_BYTES * rows
        if plan in ("single", "window", "recompute"):
            needed += size * rows * H * (gathered + 1)  # dhidden of the chunk; rows scaled by coefficients
        if plan == "jacobian":
            needed += size * rows * H * 2 * gathered  # product and dhidden of the chunk
        if plan in ("single", "window"):
            needed += size * rows * self.vocab
        if plan == "recompute" and self.rounds:
            needed += size * cols * H  # the sum of a slice of dweight
        return needed


@dataclass(frozen=True)
class Plan:
    name: str
    rows: int  # of a chunk
    cols: int  # of a tile of the vocabulary
    apart: bool = False  # recompute: dhidden and dweight in walks of their own


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
    if problem.device.type == "cpu":
        return 256 * MIB
    fast = problem.held("single") + problem.bytes("single", min(problem.rows, 4096), 1024)
    total = (
        torch.cuda.get_device_properties(problem.device).total_memory if problem.device.type == "cuda" else 0
    )
    return min(fast, total // 16) if total else fast


def why_not(plan: str, problem: Problem, available: int) -> str | None:
    """None if the plan can serve the problem within `available` bytes, else a sentence."""
    grad = problem.grad_hidden or problem.grad_head
    if plan == "score":
        return "score computes no gradients, and some are needed" if grad else None
    if plan == "jacobian":
        if problem.grad_head:
            return "jacobian serves a frozen head only, and the weight or bias needs a gradient"
        if problem.entropy_grad:
            return "jacobian does not hold what the entropy's gradient needs; use recompute"
        return None
    if plan == "recompute":
        return None
    wanted = "single" if problem.coupling == "token" else "window"
    if problem.coupling is None:
        return f"{plan} needs coefficients that are known in the forward: call align_loss"
    if plan != wanted:
        return f"the loss couples a {problem.coupling}, whose plan is {wanted!r}"
    if problem.rows and _chunk_rows(problem, plan, available - problem.held(plan)) == 0:
        rows = _least_rows(problem)
        least = problem.held(plan) + problem.bytes(plan, rows, _least_cols(problem))
        return (
            f"{plan} needs workspace_bytes >= {least} to hold all "
            f"exponents of {rows} tokens (the longest {problem.coupling} has {problem.longest}); got "
            f"{available}"
        )
    return None


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
    if not (problem.grad_hidden or problem.grad_head):
        plan = "score"
    elif plan == "auto":  # in the order of their GEMM passes
        plan = next(name for name in PLANS[1:] if why_not(name, problem, available) is None)
    else:
        reason = why_not(plan, problem, available)
        if reason is not None:
            raise ValueError(f"plan={plan!r} cannot serve this call: {reason}.")
    held = problem.held(plan)
    apart = plan == "recompute" and held > available // 2  # a fifth pass costs less than small tiles
    return Plan(plan, *_sizes(plan, problem, available - (0 if apart else held)), apart)


def _sizes(plan: str, problem: Problem, available: int) -> tuple[int, int]:
    if plan in ("single", "window"):
        rows = max(_chunk_rows(problem, plan, available), 1)
    else:
        rows = min(problem.rows, _most_rows(problem))
    rows = max(rows, 1)
    cols = _cols(problem, rows)
    while problem.bytes(plan, rows, cols) > available:
        if cols > _least_cols(problem):
            cols = max(_least_cols(problem), cols // 2)
        elif rows > MIN_ROWS and plan not in ("single", "window"):
            rows = max(MIN_ROWS, rows // 2)
        else:
            break
    if plan != "window":  # even chunks: a short last one wastes a pass over the weight
        rows = -(-problem.rows // max(1, -(-problem.rows // rows)))
    return max(rows, 1), cols


def _chunk_rows(problem: Problem, plan: str, available: int) -> int:
    """The most complete rows that fit, 0 if those of the smallest useful chunk do not."""
    least = _least_rows(problem)
    rows = max(least, min(problem.rows, _most_rows(problem)))
    while rows > least and problem.bytes(plan, rows, _least_cols(problem)) > available:
        rows = max(least, rows * 7 // 8)
    return rows if problem.bytes(plan, rows, _least_cols(problem)) <= available else 0


def _least_rows(problem: Problem) -> int:
    return min(problem.rows, max(MIN_CHUNK, problem.longest))


def _most_rows(problem: Problem) -> int:
    return MAX_ROWS.get(problem.device.type, 8192)


def _least_cols(problem: Problem) -> int:
    return min(problem.vocab, MIN_COLS)


def _cols(problem: Problem, rows: int) -> int:
    tile = TILE_BYTES.get(problem.device.type, 128 * MIB) // (problem.work.itemsize * rows)
    return min(problem.vocab, max(MIN_COLS, tile // 256 * 256))
