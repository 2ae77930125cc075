"""The suite `kernels`: every memory-bound step of the triton backend by itself, without its GEMM.

Each is held against torch's own steps first. Then it runs over as many sets of inputs as it takes for none to
be found in a cache, in turn with a large copy; its share is bytes moved per second over those of the copy.
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

from fused_align.backends import torch_, triton_

from .kernel_works import Made, Sizes, Work, without_products, works
from .measure import MIN_ROUNDS, Row, Say, about, sentence
from .providers import Ours
from .report import KERNEL

BOUND = 0.8  # share of the copy's bandwidth that a kernel is to reach
SMALL = 64 << 20  # bytes below which a launch counts for more than the bandwidth
SPREAD = 1 << 30  # bytes that the sets of inputs have together: no cache holds them
SETS = {"cuda": (4, 16), "cpu": (1, 1)}  # fewest and most of them; Triton's interpreter has no cache to miss
LIMITS = {torch.bfloat16: 4e-3, torch.float16: 1e-3}  # relative RMS: a rounding's; otherwise:
EXACT = 1e-4  # finds a wrong kernel; how many digits are right is for the tests to say
CLOCK = 2e9  # cycles per second that no GPU of today exceeds by much
OURS = Ours("fused_align[triton,kernels]", "fused-align", ours=True, backend="triton")

Calls = list[Callable[[], object]]


def why_not(device: str) -> str | None:
    """None where the kernels run, else the reason."""
    return triton_.why_not(torch.device(device))


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


def in_turn(calls: Calls, copy: Calls, device: str, rounds: int) -> tuple[list[float], list[float], float]:
    """Seconds of a call and of a copy in every round, and the host's of a launch."""
    if device == "cuda":  # the first launches compile; on a CPU nothing is compiled
        for group in (calls, copy):
            enqueue(group)
        torch.cuda.synchronize()
    host, copy_host = enqueue(calls), enqueue(copy)
    found: list[float] = []
    bare: list[float] = []
    for _ in range(rounds):
        bare.append(device_seconds(copy, copy_host, device))
        found.append(device_seconds(calls, host, device))
    return found, bare, host / len(calls)


# ---- one kernel -----------------------------------------------------------------------------------------


def compared(work: Work, steps: Any) -> tuple[float, str | None]:
    """Relative RMS error against torch's steps on the same inputs, and a sentence where it is too large."""
    with without_products(steps):
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


def bound_calls(work: Work, steps: Any, device: str) -> tuple[Calls, int]:
    """The calls on enough sets of inputs, and the bytes that one moves."""
    first = work.make(0)
    fewest, most = SETS[device]
    count = min(most, max(fewest, math.ceil(SPREAD / max(1, first.nbytes))))
    made = [first, *(work.make(seed) for seed in range(1, count))]

    def bound(one: Made) -> Callable[[], object]:
        return lambda: one.call(steps)

    return [bound(one) for one in made], first.nbytes


def measure(work: Work, steps: Any, copy: Calls, copied: int, s: Sizes, rounds: int) -> Row:
    """A row of times and bytes; with "failed" where the kernel fails or is beyond the gate."""
    row: Row = {
        "shape": "kernels", "rows": s.tokens, "hidden": s.hidden, "vocab": s.vocab, "dtype": "bfloat16",
        "logits": "randn", "mode": KERNEL, "live": 1.0, "dead": 0.0, "dead_by": "sequences",
        "tile": [s.rows, s.cols], "provider": work.name, **about(OURS, s.device),
    }  # fmt: skip
    try:
        row["error_value"], bad = compared(work, steps)
        if bad:
            return {**row, "failed": bad}
        with without_products(steps):
            calls, nbytes = bound_calls(work, steps, s.device)
            times, bare, host = in_turn(calls, copy, s.device, rounds)
    except Exception as error:
        return {**row, "failed": sentence(error)}
    cuts, seconds = statistics.quantiles(times, n=5, method="inclusive"), statistics.median(times)
    per_byte = statistics.median(bare) / copied
    small = nbytes < SMALL
    return {
        **row, "rounds": rounds, "seconds": seconds, "seconds_p20": cuts[0], "seconds_p80": cuts[-1],
        "host_seconds": host, "moved_bytes": nbytes, "copy_bytes_per_second": 1 / per_byte,
        "ratio": seconds / (nbytes * per_byte), "bound": None if small else 1 / BOUND,
        "note": "bound by its launch" if small else "",
    }  # fmt: skip


def run(s: Sizes, wanted: Callable[[str], bool], rounds: int, deadline: float, say: Say) -> Iterator[Row]:
    """A row for each kernel; `say` is told which there was no time for.

    Raises:
        ValueError: the kernels cannot run on this device.
    """
    reason = why_not(s.device)
    if reason is not None:
        raise ValueError(f"the suite kernels needs the triton backend, but {reason}.")
    from fused_align.backends.triton_ import steps

    copied = 2 * (nbytes := 1 << 28 if s.device == "cuda" else 1 << 20)
    copy = copies(s.device, nbytes)
    for work in works(s):
        if not wanted(work.name):
            continue
        if time.monotonic() > deadline:
            say(f"not run, the time was up: {work.name}")
            continue
        row = measure(work, steps, copy, copied, s, rounds)
        gc.collect()  # failed calls' tensors
        yield row


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


def candidates(s: Sizes, wanted: Callable[[str], bool], deadline: float) -> Iterator[list[str]]:
    """Per kernel and block sizes: name, sizes, microseconds, the default and the best named."""
    from fused_align.backends.triton_ import steps, tuning

    copy = copies(s.device, 1 << 20)  # in_turn wants some; its times are not used
    for work in works(s):
        if work.launch is None or not wanted(work.name) or time.monotonic() > deadline:
            continue
        launch = getattr(tuning, work.launch)
        tried = {}
        with without_products(steps):
            calls, _ = bound_calls(work, steps, s.device)
            for blocks in (launch.default, *launch.others):
                with launched_with(work.launch, blocks):
                    try:
                        tried[blocks] = statistics.median(in_turn(calls, copy, s.device, MIN_ROUNDS)[0])
                    except Exception as error:  # too much shared memory, or too many registers
                        yield [work.name, _blocks(blocks), "", sentence(error)]
        del calls
        best = min(tried, key=lambda blocks: tried[blocks], default=None)
        for blocks, seconds in tried.items():
            marks = ["default"] * (blocks == launch.default) + ["best"] * (blocks == best)
            yield [work.name, _blocks(blocks), f"{seconds * 1e6:.1f}", ", ".join(marks)]


def _blocks(blocks: Any) -> str:
    return f"{blocks.rows} x {blocks.cols or '-'}, {blocks.warps} warps"
