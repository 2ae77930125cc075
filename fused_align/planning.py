"""`explain`: which backends and plans could serve a call, at what estimated cost, and which one would run."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from . import backends
from .api import loss_problem
from .backends.operands import Head
from .batch import IGNORE_INDEX, Batch
from .humanline import RatioClip
from .linear.logp import autocast_dtype, check_call
from .linear.ops import make_problem
from .linear.plan import MIB, Problem, budget, candidates, check_plan, choose, gemm_dtype
from .losses.base import Loss

SAMPLE_FLOPS = {"cpu": 4e9, "cuda": 4e12}  # of the GEMM that is timed


def explain(
    hidden: Tensor,  # [..., H]
    weight: Tensor,  # [V, H]
    target: Tensor | Batch,  # [...] int64, or the batch of a loss
    loss: Loss | None = None,
    *,
    humanline: RatioClip | None = None,
    bias: Tensor | None = None,  # [V]
    temperature: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    grad_scale: float | None = None,
    backend: str = "auto",
    plan: str = "auto",
    precision: str = "high",
    workspace_bytes: int | None = None,
    max_live: int | None = None,
    main_grad: Tensor | None = None,  # [V, H]
    entropy: bool = False,
    lse: bool = False,
) -> str:
    """What `align_loss` (given a Batch and a loss) or `token_stats` (given targets) would do.

    For every backend whether it can run here; for every plan its GEMM passes, its time and its bytes beyond
    inputs and outputs, as the planner estimates them, or why it cannot serve; and what would run. The time of
    a pass is taken from one GEMM that is timed on the spot (some milliseconds). Computes nothing else.

    Raises:
        ValueError, TypeError: as the function that it explains.
    """
    if isinstance(target, Batch) != isinstance(loss, Loss):
        raise TypeError(
            "explain: pass a Batch together with a loss, as to align_loss, or a tensor of targets without "
            f"one, as to linear_logp; got a {type(target).__name__} and loss={loss!r}."
        )
    targets = target.target if isinstance(target, Batch) else target
    check_call(
        "explain", hidden, weight, targets, bias=bias, temperature=temperature, logit_scale=logit_scale,
        softcap=softcap, precision=precision, workspace_bytes=workspace_bytes, max_live=max_live,
        main_grad=main_grad,
    )  # fmt: skip
    check_plan(plan)
    backend = backends.pick(backend, hidden.device)
    operand = autocast_dtype(hidden, weight)
    head = Head(weight, bias, logit_scale, softcap, operand, precision == "bf16", backend)
    flat = hidden.reshape(-1, hidden.shape[-1])
    if isinstance(target, Batch) and loss is not None:
        problem = loss_problem(
            head, flat, target.live(max_live), loss, humanline, main_grad=main_grad is not None,
            scale_known=grad_scale is not None,
        )  # fmt: skip
    else:
        grad = torch.is_grad_enabled()
        live = int((targets != IGNORE_INDEX).sum()) if max_live is None else min(max_live, targets.numel())
        grad_hidden = grad and hidden.requires_grad
        grad_head = grad and any(t is not None and t.requires_grad for t in (weight, bias))
        problem = make_problem(
            head, flat, live, stats=("entropy",) * entropy, learnt=("entropy",) * entropy,
            grad_hidden=grad_hidden, grad_head=grad_head, main_grad=main_grad is not None,
            static=max_live is not None,
        )  # fmt: skip
    return "\n".join(_lines(problem, plan, workspace_bytes))


def _lines(problem: Problem, plan: str, workspace_bytes: int | None) -> list[str]:
    available = budget(workspace_bytes, problem)
    seconds = _seconds_per_flop(problem) * 2 * problem.rows * problem.vocab * problem.hidden
    chosen = choose(problem, plan, workspace_bytes).name
    wanted = [name for name in ("hidden", "head") if getattr(problem, f"grad_{name}")]
    lines = [
        f"{problem.rows} live of {problem.given} tokens, H={problem.hidden}, V={problem.vocab}, hidden "
        f"{_name(problem.hidden_dtype)}, weight {_name(problem.weight_dtype)}, on {problem.device}",
        f"gradients: {' and '.join(wanted) or 'none'}; coefficients known "
        + ("at the end" if problem.coupling in (None, "batch") else f"per {problem.coupling}"),
        f"budget: {available / MIB:.1f} MiB; one GEMM pass: {_time(seconds)}",
        "",
        "backend",
    ]
    for name, reason in backends.table(problem.device):
        lines.append(f"{name:10s} {'runs' if name == problem.backend else reason or 'usable'}")
    lines += ["", f"{'plan':10s} {'passes':>6s} {'time':>9s} {'MiB':>8s} {'rows x cols':>14s}"]
    for found in candidates(problem, available):
        if found.plan is None:
            lines.append(f"{found.name:10s} no: {found.reason}")
            continue
        sizes = f"{found.plan.rows} x {found.plan.cols}"
        lines.append(
            f"{found.name:10s} {found.passes:6.2f} {_time(found.cost * seconds):>9s} "
            f"{found.nbytes / MIB:8.1f} {sizes:>14s}{_verdict(found.name, chosen, plan)}"
        )
    if problem.backend == "eager":
        lines.append("backend eager holds full logits, whatever the plan")
    return lines


def _verdict(name: str, chosen: str, asked: str) -> str:
    if name != chosen:
        return ""
    return "  runs: asked for" if asked == name else "  runs: the least time within the budget"


def _seconds_per_flop(problem: Problem) -> float:
    """The best of three products with the problem's H and dtype, big enough to reach the device's speed."""
    if not problem.rows:
        return 0.0
    kind = problem.device.type
    dtype, rows = gemm_dtype(problem), min(problem.rows, 1024)
    cols = int(SAMPLE_FLOPS.get(kind, 4e9) / (2 * rows * problem.hidden))
    cols = max(256, min(cols, problem.vocab))
    x = torch.ones(rows, problem.hidden, dtype=dtype, device=problem.device)
    weight = torch.ones(cols, problem.hidden, dtype=dtype, device=problem.device)
    out = torch.empty(rows, cols, dtype=dtype, device=problem.device)
    best = float("inf")
    for _ in range(4):
        _wait(problem.device)
        start = time.perf_counter()
        torch.mm(x, weight.t(), out=out)
        _wait(problem.device)
        best = min(best, time.perf_counter() - start)
    return best / (2 * rows * cols * problem.hidden)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.2f} ms"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
