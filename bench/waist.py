"""The waist against its bare GEMMs: `python bench/waist.py`.

One G is the full-size product hidden @ weight.T by torch.mm, allocating its output: what any exact method
must at least compute, once to score, twice with a frozen head, three times with a trainable one. Every row of
the table is timed in turn with the bare GEMMs in each round, so that the ratio is of the same minutes of the
same machine; medians over rounds. Errors are against float64 on a sample of the rows.

peaked logits: hidden rows lie near the weight row of their target, as a trained model's do, so that most
exponents are far below zero; on such logits a naive exp is slow and randn does not show it.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fused_align as fa


def make(kind: str, rows: int, size: int, vocab: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, H], weight [V, H], target [N]; logits are N(0, 1) for "randn"."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(vocab, size, generator=generator) / math.sqrt(size)
    hidden = torch.randn(rows, size, generator=generator)
    target = torch.randint(0, vocab, (rows,), generator=generator)
    if kind == "peaked":  # the target's logit leads by about 8 for half of the rows and by 40 for the others
        lead = torch.where(torch.arange(rows) % 2 == 0, 8.0, 40.0)
        hidden = 3 * hidden + lead[:, None] * weight[target]
    return hidden.to(device), weight.to(device), target.to(device)


def timed(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def cases(hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, tuple[int, Callable[[], object]]]:
    """name -> (GEMM passes of its plan, call)."""
    frozen = hidden.clone().requires_grad_()
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    rows = target.numel()
    pairs = 2 * max(1, rows // 256)  # sequences of 128 tokens
    offsets = torch.linspace(0, rows, pairs + 1).round().int().to(target.device)
    with torch.no_grad():
        logp = fa.linear_logp(hidden, weight, target)
    noise = torch.randn(rows, generator=torch.Generator().manual_seed(1)).to(target.device)
    batch = fa.Batch(
        target,
        cu_seqlens=offsets,
        ref_logp=logp + 0.3 * noise,
        old_logp=logp + 0.3 * noise,
        advantage=torch.linspace(-1, 1, pairs).to(target.device),
    )

    def score() -> None:
        with torch.no_grad():
            fa.linear_logp(hidden, weight, target)

    def gradient(loss: fa.Loss | None, head: Tensor, x: Tensor, plan: str) -> Callable[[], object]:
        def run() -> None:
            x.grad = head.grad = None
            if loss is None:
                fa.linear_logp(x, head, target, plan=plan).sum().backward()
            else:
                fa.align_loss(x, head, batch, loss, plan=plan).loss.backward()

        return run

    return {
        "score": (1, score),
        "frozen head, linear_logp (jacobian)": (2, gradient(None, weight, frozen, "jacobian")),
        "frozen head, DPO (jacobian)": (2, gradient(fa.DPO(), weight, frozen, "auto")),
        "trainable, SFT (single)": (3, gradient(fa.SFT(), w, h, "single")),
        "trainable, GRPO (single)": (3, gradient(fa.GRPO(beta=0.1), w, h, "single")),
        "trainable, DPO (window)": (3, gradient(fa.DPO(), w, h, "window")),
        "trainable, linear_logp (recompute)": (4, gradient(None, w, h, "recompute")),
    }


def bare(hidden: Tensor, weight: Tensor) -> dict[int, Callable[[], object]]:
    """The GEMMs of 1, 2, 3 and 4 passes: logits, dhidden, dweight, logits again."""
    dz = torch.randn(hidden.shape[0], weight.shape[0], device=hidden.device)

    def gemms(passes: int) -> Callable[[], object]:
        def run() -> None:
            torch.mm(hidden, weight.t())
            if passes > 1:
                torch.mm(dz, weight)
            if passes > 2:
                torch.mm(dz.t(), hidden)
            if passes > 3:
                torch.mm(hidden, weight.t())

        return run

    return {passes: gemms(passes) for passes in (1, 2, 3, 4)}


def errors(hidden: Tensor, weight: Tensor, target: Tensor) -> dict[str, float]:
    """Worst errors of float32 against dense float64, over every plan, on up to 256 rows: of logp relative to
    max(1, |logp|), of the gradients in relative RMS."""
    rows = min(256, target.numel() // 4 * 4)
    y = target[:rows]
    with torch.no_grad():
        logp = fa.linear_logp(hidden[:rows], weight, y)
        true = fa.linear_logp(hidden[:rows].double(), weight.double(), y, backend="eager")
    offsets = torch.arange(0, rows + 1, rows // 4, device=y.device)
    batch = fa.Batch(y, cu_seqlens=offsets, ref_logp=logp + 0.1)
    worst = [0.0]

    def gradients(loss: fa.Loss, plan: str, dtype: torch.dtype, frozen: bool) -> tuple[Tensor, ...]:
        x = hidden[:rows].detach().to(dtype).requires_grad_()
        w = weight.detach().to(dtype).requires_grad_(not frozen)
        backend = "eager" if dtype == torch.float64 else "auto"
        value = fa.align_loss(x, w, batch, loss, plan=plan, backend=backend).loss
        return torch.autograd.grad(value, (x,) if frozen else (x, w))

    for loss, chunked in ((fa.SFT(), "single"), (fa.DPO(), "window")):
        expected = gradients(loss, "auto", torch.float64, False)
        for plan in ("jacobian", chunked, "recompute"):
            got = gradients(loss, plan, torch.float32, plan == "jacobian")
            for g, e in zip(got, expected, strict=False):
                worst.append(((g - e).norm() / e.norm()).item())
    off = (logp - true).abs() / true.abs().clamp(min=1)
    # of tensors: max() of Python numbers passes over NaN
    return {"logp": off.max().item(), "gradients": torch.tensor(worst).max().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description="The waist against its bare GEMMs.")
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=["randn", "peaked"], choices=["randn", "peaked"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", help="also append the rows as JSON lines to this file")
    args = parser.parse_args()
    here = Path(__file__).parent
    revision = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(revision, capture_output=True, text=True, cwd=here).stdout.strip()
    about = {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(), "torch": torch.__version__, "commit": commit,
        "rows": args.rows, "hidden": args.hidden, "vocab": args.vocab,
    }  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for kind in args.kinds:
        hidden, weight, target = make(kind, args.rows, args.hidden, args.vocab, args.device)
        error = errors(hidden, weight, target)
        print(
            f"\n{kind}: errors against float64 over all plans: logp {error['logp']:.1e} relative to "
            f"max(1, |logp|), gradients {error['gradients']:.1e} relative RMS"
        )
        if not all(e <= 1e-5 for e in error.values()):
            raise SystemExit("the waist is less exact than 1e-5: no timing is worth reporting")
        gemms, runs = bare(hidden, weight), cases(hidden, weight, target)
        for run in (*gemms.values(), *(call for _, call in runs.values())):
            run()
        bare_times: dict[int, list[float]] = {passes: [] for passes in gemms}
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for passes, run in gemms.items():
                bare_times[passes].append(timed(run, args.device))
            for name, (_, run) in runs.items():
                times[name].append(timed(run, args.device))
        print(f"{'case':38s} {'G':>2s} {'seconds':>8s} {'bare':>8s} {'ratio':>6s}")
        for name, (passes, _) in runs.items():
            seconds, floor = statistics.median(times[name]), statistics.median(bare_times[passes])
            print(f"{name:38s} {passes:2d} {seconds:8.3f} {floor:8.3f} {seconds / floor:6.2f}")
            if args.json:
                row = {**about, "logits": kind, "case": name, "passes": passes, "seconds": seconds,
                       "bare_seconds": floor, "ratio": seconds / floor, **error}  # fmt: skip
                with open(args.json, "a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
