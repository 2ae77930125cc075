"""The suite `kernels`: every memory-bound step of the backends of kernels by itself, without its GEMM.

Each is held against torch's own steps first. Then the backends run it in turn with a large copy, over as many
sets of inputs as it takes for none to be found in a cache; its share is bytes moved per second over those of
the copy.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fused_align import backends
from fused_align.backends import torch_

from .kernel_works import LAUNCH, Made, Sizes, Work, without_products, works
from .measure import MIN_ROUNDS, Row, Say, about, sentence
from .providers import Ours
from .report import KERNEL, holds
from .verdicts import compared_times

BOUND = 0.85  # share of the copy's bandwidth that a kernel is to reach
SMALL = 64 << 20  # bytes below which a launch counts for more than the bandwidth
SPREAD = 1 << 30  # bytes that the sets of inputs have together: no cache holds them
SETS = {"cuda": (4, 16), "cpu": (1, 1)}  # fewest and most of them; on a CPU no time is worth the name
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 1e-3}  # relative RMS: a rounding's; otherwise:
EXACT = 1e-4  # finds a wrong kernel; how many digits are right is for the tests to say
CLOCK = 2e9  # cycles per second that no GPU of today exceeds by much
OURS = Ours("fused_align[kernels]", "fused-align", ours=True)

Calls = list[Callable[[], object]]


def reasons(device: str) -> dict[str, str | None]:
    """None for each backend whose kernels run, else why they do not."""
    return {name: reason for name, reason in backends.table(device) if name in backends.KERNELS}


# ---- time -----------------------------------------------------------------------------------------------


def enqueue(calls: Calls) -> float:
    """Seconds until all are launched."""
    start = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start


def device_seconds(calls: Calls, host: float, device: str) -> float:
    """Seconds of one call, the launches hidden behind a kernel that waits until all are in the queue."""
    if device != "cuda":
        return enqueue(calls) / len(calls)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(int((1e-3 + 1.5 * host) * CLOCK))
    begin.record()
    enqueue(calls)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3 / len(calls)


def copies(device: str, nbytes: int) -> Calls:
    """Copies of so many bytes, from four places to four others."""
    pairs = [[torch.ones(nbytes, dtype=torch.uint8, device=device) for _ in range(2)] for _ in range(4)]
    return [lambda a=a, b=b: b.copy_(a) for a, b in pairs]


def in_turn(
    groups: dict[str, Calls], device: str, rounds: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds of a call of each group in every round, and the host's of a launch. They have run before."""
    host = {name: enqueue(calls) for name, calls in groups.items()}
    found: dict[str, list[float]] = {name: [] for name in groups}
    order = list(groups)
    for done in range(rounds):
        at = done % len(order)  # each round begins with another one
        for name in order[at:] + order[:at]:
            found[name].append(device_seconds(groups[name], host[name], device))
    return found, {name: seconds / len(groups[name]) for name, seconds in host.items()}


def first(calls: Calls, device: str) -> None:
    """The first launches, which compile; on a CPU nothing is compiled."""
    if device == "cuda":
        enqueue(calls)
        torch.cuda.synchronize()


# ---- one kernel -----------------------------------------------------------------------------------------


def compared(work: Work, steps: Any) -> tuple[float, str | None]:
    """Relative RMS error against torch's steps on the same inputs, and a sentence where it is too large."""
    with without_products():
        expected, found = (work.make(0).call(each) for each in (torch_, steps))
    worst, bad = 0.0, None
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        if a is None or b is None:
            continue
        error, limit = _relative(a, b), LIMITS.get(a.dtype, EXACT)
        worst = max(worst, error) if error == error else math.nan
        if not error <= limit:
            bad = f"beyond the gate: output {index} is off by {error:.1e} (limit {limit:.1e})"
    return worst, bad


def _relative(found: Tensor, expected: Tensor) -> float:
    """Block by block: float64 copies of a large tensor are four times its size."""
    off, whole = 0.0, 0.0
    for a, b in zip(found.flatten().split(1 << 26), expected.flatten().split(1 << 26), strict=True):
        # exponentials are near 2^-58, whose squares float32 has no room for
        off += (a.double() - b.double()).square().sum().item()
        whole += b.double().square().sum().item()
    return math.sqrt(off / whole) if whole else math.sqrt(off)


def sets_of(work: Work, device: str) -> list[Made]:
    """Enough sets of inputs."""
    one = work.make(0)
    fewest, most = SETS[device]
    count = min(most, max(fewest, math.ceil(SPREAD / max(1, one.nbytes))))
    return [one, *(work.make(seed) for seed in range(1, count))]


def bound_to(steps: Any, made: list[Made]) -> Calls:
    return [lambda one=one: one.call(steps) for one in made]


def measure(work: Work, using: dict[str, Any], copy: Calls, copied: int, s: Sizes, rounds: int) -> list[Row]:
    """A row of times and bytes for each backend; with "failed" where it fails or is beyond the gate."""
    rows: dict[str, Row] = {}
    groups: dict[str, Calls] = {"": copy}
    made = None
    for name, steps in using.items():
        rows[name] = {
            "shape": "kernels", "rows": s.tokens, "hidden": s.hidden, "vocab": s.vocab, "dtype": "bfloat16",
            "logits": "randn", "mode": KERNEL, "live": 1.0, "dead": 0.0, "dead_by": "sequences",
            "tile": [s.rows, s.cols], "provider": f"{name}:{work.name}", **about(OURS, s.device),
        }  # fmt: skip
        try:
            rows[name]["error_value"], bad = compared(work, steps)
            if bad:
                rows[name]["failed"] = bad
                continue
            made = made or sets_of(work, s.device)
            with without_products():
                first(calls := bound_to(steps, made), s.device)
            groups[name] = calls
        except Exception as error:  # a failure is a result: the row says so
            rows[name]["failed"] = sentence(error)
    if made is None or len(groups) == 1:
        return list(rows.values())
    try:
        first(copy, s.device)
        with without_products():
            times, host = in_turn(groups, s.device, rounds)
    except Exception as error:
        return [{"failed": sentence(error), **row} for row in rows.values()]
    nbytes, per_byte = made[0].nbytes, statistics.median(times.pop("")) / copied
    small = nbytes < SMALL
    for name, seconds in times.items():
        cuts, middle = statistics.quantiles(seconds, n=5, method="inclusive"), statistics.median(seconds)
        rows[name] |= {
            "rounds": rounds, "seconds": middle, "seconds_p20": cuts[0], "seconds_p80": cuts[-1],
            "host_seconds": host[name], "moved_bytes": nbytes, "copy_bytes_per_second": 1 / per_byte,
            "ratio": middle / (nbytes * per_byte), "bound": None if small else 1 / BOUND,
            "most_seconds": work.seconds if s.device == "cuda" else None,
            "note": "bound by its launch" if small else "",
        }  # fmt: skip
    return list(rows.values())


def run(s: Sizes, wanted: Callable[[str], bool], rounds: int, deadline: float, say: Say) -> Iterator[Row]:
    """A row for each kernel of each backend; `say` is told which there was no time for, and who can't run.

    wanted: by a kernel's name, "exp_tile[sums]", or with the backend's before it, "cuda:exp_tile[sums]".

    Raises:
        ValueError: no backend's kernels can run on this device.
    """
    why = reasons(s.device)
    if all(why.values()):
        said = "; ".join(f"{name}: {reason}" for name, reason in why.items())
        raise ValueError(f"the suite kernels needs a backend of kernels, and there is none: {said}.")
    for name, reason in why.items():
        if reason is not None:
            say(f"not run, {name}: {reason}")
    if s.device == "cpu":
        say("on a CPU these are the times of Triton's interpreter and of an emulation of CUDA: no kernel's")
    steps = {name: backends.steps(name) for name in backends.KERNELS if why[name] is None}
    copied = 2 * (nbytes := 1 << 28 if s.device == "cuda" else 1 << 20)
    copy = copies(s.device, nbytes)
    for work in works(s):
        using = {name: of for name, of in steps.items() if wanted(work.name) or wanted(f"{name}:{work.name}")}
        if not using:
            continue
        if time.monotonic() > deadline:
            say(f"not run, the time was up: {work.name}")
            continue
        rows = measure(work, using, copy, copied, s, rounds)
        gc.collect()  # failed calls' tensors
        yield from rows


# ---- block sizes ----------------------------------------------------------------------------------------


@contextmanager
def launched_with(name: str, blocks: Any) -> Iterator[None]:
    """A kernel of tuning.py with other block sizes, and no tuning of its own."""
    from fused_align.backends.triton_ import tuning

    before = getattr(tuning, name)
    setattr(tuning, name, replace(before, default=blocks, others=()))
    try:
        yield
    finally:
        setattr(tuning, name, before)


def candidates(s: Sizes, wanted: Callable[[str], bool]) -> Iterator[list[str]]:
    """Per kernel of triton and block sizes: name, sizes, microseconds, the default and the best named.

    Raises:
        ValueError: triton's kernels cannot run on this device.
    """
    if reason := reasons(s.device)["triton"]:
        raise ValueError(f"--candidates are block sizes of the backend triton, but {reason}.")
    from fused_align.backends.triton_ import tuning

    steps = backends.steps("triton")
    for work in works(s):
        if work.launch is None or not (wanted(work.name) or wanted(f"triton:{work.name}")):
            continue
        launch = getattr(tuning, work.launch)
        tried = {}
        with without_products():
            calls = bound_to(steps, sets_of(work, s.device))
            for blocks in (launch.default, *launch.others):
                with launched_with(work.launch, blocks):
                    try:
                        first(calls, s.device)
                        times, _ = in_turn({"": calls}, s.device, MIN_ROUNDS)
                        tried[blocks] = statistics.median(times[""])
                    except Exception as error:  # too much shared memory, or too many registers
                        yield [work.name, _blocks(blocks), "", sentence(error)]
        del calls
        best = min(tried, key=lambda blocks: tried[blocks], default=None)
        for blocks, seconds in tried.items():
            marks = ["default"] * (blocks == launch.default) + ["best"] * (blocks == best)
            yield [work.name, _blocks(blocks), f"{seconds * 1e6:.1f}", ", ".join(marks)]


def _blocks(blocks: Any) -> str:
    return f"{blocks.rows} x {blocks.cols or '-'}, {blocks.warps} warps"


# ---- what they show -------------------------------------------------------------------------------------


def summary(rows: list[Row]) -> list[str]:
    """What is to hold and does not, how many there are that do, and which backend is the faster one."""
    done = [row for row in rows if "failed" not in row]
    lines = []
    for name in backends.KERNELS:
        own = [row for row in done if row["provider"].startswith(f"{name}:")]
        lines += [f"does NOT hold: {_claim(row)}" for row in own if holds(row) is False]
        for kind, what in (
            ("bound", f"kernels reach {BOUND:.0%} of a copy's bandwidth"),
            ("most_seconds", f"losses take less than {LAUNCH * 1e6:.0f} µs"),
        ):
            verdicts = [holds(row) for row in own if row.get(kind)]
            if verdicts:
                lines.append(f"{name}: {sum(map(bool, verdicts))} of {len(verdicts)} {what}")
    return lines + compared_times(
        {
            (row["provider"].partition(":")[0], row["provider"].partition(":")[2]): row["seconds"]
            for row in done
        }
    )


def _claim(row: Row) -> str:
    if most := row.get("most_seconds"):
        return f"{row['provider']} takes {row['seconds'] * 1e6:.1f} µs, not less than {most * 1e6:g}"
    return f"{row['provider']} reaches {1 / row['ratio']:.2f} of a copy's bandwidth, less than {BOUND:g}"
