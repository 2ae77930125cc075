"""Which plan runs, and in what sizes: the fewest GEMM passes that fit a byte budget.

    plan       when                                             GEMM passes   held at once
    score      no gradient                                      1             one tile [rows, cols]
    jacobian   the head is frozen                               2             one tile, and E @ W of every row
    single     coefficients known per token (align_loss)        3             E of a chunk of rows [rows, V]
    window     coefficients known per sequence or pair          3             E of a chunk of whole items
    recompute  everything else, or too small a budget           4             one tile

`single` and `window` are one mechanism: a chunk of whole items whose exponentials stay until its gradient
GEMMs have run. The result does not depend on the plan beyond rounding.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

PLANS = ("auto", "score", "jacobian", "single", "window", "recompute")
HALF = (torch.bfloat16, torch.float16)
MIB = 1 << 20

# A tile that stays in a CPU's cache between the GEMM and the passes over it; on a GPU, one that fills it.
TILE_BYTES = {"cpu": 8 * MIB, "cuda": 128 * MIB}
MAX_ROWS = {"cpu": 2048, "cuda": 8192}
MIN_ROWS, MIN_COLS = 32, 256  # the smallest tile worth a GEMM; a budget below it is raised to it
MIN_CHUNK = 128  # complete rows: below this the weight is re-read too often, and recompute is cheaper
GATHER_BYTES = 3 * MIB  # gathered weight rows and the products with them, see backends.torch_


@dataclass(frozen=True)
class Problem:
    """What the planner reads: sizes, dtypes, which gradients are needed, when coefficients are known."""

    rows: int  # live rows
    hidden: int  # H
    vocab: int  # V
    work: torch.dtype  # of logits and sums
    hidden_dtype: torch.dtype
    weight_dtype: torch.dtype
    device: torch.device
    grad_hidden: bool
    grad_head: bool  # weight or bias
    masked: bool = False  # live rows must be gathered
    capped: bool = False
    entropy: bool = False  # forward
    entropy_grad: bool = False
    coupling: str | None = (
        None  # "token" | "sequence" | "pair": when coefficients are known; None: at the end
    )
    longest: int = 1  # rows of the largest item

    def scratch(self, plan: str) -> int:
        """How many tiles are alive at once: E, tanh^2 under a softcap, exponents where the entropy asks."""
        entropy = self.entropy or (self.entropy_grad and plan == "recompute")
        return 1 + int(self.capped) + int(entropy)

    def bytes(self, plan: str, rows: int, cols: int) -> int:
        """Extra memory of a plan in chunks of `rows` and tiles of `cols`, besides inputs and outputs."""
        size, H = self.work.itemsize, self.hidden
        half_weight = self.weight_dtype in HALF
        gathered = self.masked or self.hidden_dtype != self.work
        needed = size * rows * cols * self.scratch(plan)
        needed += size * rows * H * gathered  # x
        needed += size * cols * H * half_weight  # a tile of the weight, upcast
        needed += min(GATHER_BYTES, 3 * size * rows * H)
        if plan in ("single", "window", "recompute"):
            needed += size * rows * H * (gathered + 1)  # dhidden of the chunk; rows scaled by coefficients
        if plan == "jacobian":
            needed += size * rows * H * 2 * gathered  # product and dhidden of the chunk
        if plan in ("single", "window"):
            needed += size * rows * self.vocab
            needed += size * self.vocab * H * (half_weight and self.grad_head)  # float32 dweight
        if plan == "recompute" and half_weight:
            needed += size * cols * H  # float32 slice of dweight
        return needed


@dataclass(frozen=True)
class Plan:
    name: str
    rows: int  # of a chunk
    cols: int  # of a tile of the vocabulary


def budget(workspace_bytes: int | None, problem: Problem) -> int:
    """The byte budget: the argument, else FUSED_ALIGN_WORKSPACE_BYTES, else what the fast plan needs."""
    if workspace_bytes is None:
        workspace_bytes = int(os.environ.get("FUSED_ALIGN_WORKSPACE_BYTES", "0")) or None
    if workspace_bytes is not None:
        if workspace_bytes <= 0:
            raise ValueError(f"workspace_bytes must be positive; got {workspace_bytes}.")
        return workspace_bytes
    if problem.device.type == "cpu":
        return 256 * MIB
    fast = problem.bytes("single", min(problem.rows, 4096), 1024)
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
    rows = _chunk_rows(plan, problem, available)
    if rows < min(problem.rows, MIN_CHUNK) or rows < problem.longest:
        least = problem.bytes(plan, max(min(problem.rows, MIN_CHUNK), problem.longest), MIN_COLS)
        return (
            f"{plan} needs workspace_bytes >= {least} to hold complete rows of "
            f"max({MIN_CHUNK}, longest {problem.coupling} = {problem.longest}) tokens; got {available}"
        )
    return None


def choose(problem: Problem, plan: str = "auto", workspace_bytes: int | None = None) -> Plan:
    """The plan and its sizes. Where no gradient is needed that is score, whatever plan would form them.

    Raises:
        ValueError: no such plan, or the plan asked for cannot serve, with the reason.
    """
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {list(PLANS)}; got {plan!r}.")
    available = budget(workspace_bytes, problem)
    if not (problem.grad_hidden or problem.grad_head):
        plan = "score"
    elif plan == "auto":  # in the order of their GEMM passes
        plan = next(name for name in PLANS[1:] if why_not(name, problem, available) is None)
    else:
        reason = why_not(plan, problem, available)
        if reason is not None:
            raise ValueError(f"plan={plan!r} cannot serve this call: {reason}.")
    return Plan(plan, *_sizes(plan, problem, available))


def _sizes(plan: str, problem: Problem, available: int) -> tuple[int, int]:
    if plan in ("single", "window"):
        rows = _chunk_rows(plan, problem, available)
        if plan == "single" and rows:  # even chunks: a short last one wastes a pass over the weight
            rows = -(-problem.rows // max(1, -(-problem.rows // rows)))
        return max(rows, 1), _cols(problem, max(rows, 1))
    # A 16-bit dweight is written once, from a float32 slice, so recompute sees all rows for each slice.
    whole = plan == "recompute" and problem.grad_head and problem.weight_dtype in HALF
    rows = max(1, problem.rows if whole else min(problem.rows, MAX_ROWS.get(problem.device.type, 8192)))
    cols = _cols(problem, rows)
    while problem.bytes(plan, rows, cols) > available:
        if cols > MIN_COLS:
            cols = max(MIN_COLS, cols // 2)
        elif rows > MIN_ROWS and not whole:
            rows = max(MIN_ROWS, rows // 2)
        else:
            break
    return rows, cols


def _chunk_rows(plan: str, problem: Problem, available: int) -> int:
    """The most complete rows that fit: bytes() is linear in rows for a given number of columns."""
    rows = min(problem.rows, MAX_ROWS.get(problem.device.type, 8192))
    while rows > 0 and problem.bytes(plan, rows, _cols(problem, rows)) > available:
        rows = rows * 7 // 8
    return rows


def _cols(problem: Problem, rows: int) -> int:
    tile = TILE_BYTES.get(problem.device.type, 128 * MIB) // (problem.work.itemsize * rows)
    return min(problem.vocab, max(MIN_COLS, tile // 256 * 256))
