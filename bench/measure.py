"""Measures one case: correctness first, then times in turn with the bare GEMMs, then peak memory.

The bare GEMMs are full-size `torch.mm` that allocate their outputs: what any exact method must compute. Every
provider is timed in turn with them in each round, so that a ratio is of the same minutes of the same machine.
"""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import json
import math
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

import fused_align as fa

from .cases import Case, Inputs, make_inputs, without_reference
from .peers import peers
from .providers import EAGER, WIDE_EAGER, Call, Ours, Provider, Result, ours, torch_providers
from .reference import IGNORE, SEQUENCE, Log, Truth, truth

ROOT = Path(__file__).resolve().parent.parent
EXACT = 1e-5  # float32: log-probs relative to max(1, |logp|), gradients in relative RMS
VALUE = 1e-4  # 16 bit: log-probs and losses, relative to max(1, |value|)
SLACK = 1.1  # 16 bit: two roundings of the same size differ by chance
MIN_ROUNDS = 5  # fewer have no p20 and p80 worth the name
PATIENCE = 60.0  # seconds for a peer's first call, which may compile, where the time is limited
FEW_ROWS = 2048  # of the eager run that sets the 16-bit limits where there are many

Row = dict[str, Any]
Errors = dict[str, float]
Say = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """device: "cpu" or "cuda". memory: whether to measure it. max_seconds: a peer's longest call to time.

    share, deadline: when, by time.monotonic, MIN_ROUNDS are rounds enough, and when everything ends.
    """

    device: str
    rounds: int = 5
    memory: bool = True
    max_seconds: float = 60.0
    share: float = math.inf
    deadline: float = math.inf

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    def enough(self, rounds: int) -> bool:
        """Whether so many rounds must do."""
        if rounds >= self.rounds or (rounds >= 2 and self.late):
            return True
        return rounds >= MIN_ROUNDS and time.monotonic() > self.share


class TooLong(BaseException):
    """A peer's first call was cut short. Not an Exception: a library might take it for one of its own."""


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Raises TooLong after so many seconds, where signals can: in the main thread, and not on Windows."""
    if not math.isfinite(seconds) or not hasattr(signal, "setitimer"):
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise TooLong(f"the first call was cut short after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def providers(device: str) -> list[Provider]:
    """All of them, whether they can run here or not."""
    return [*ours(device), *torch_providers(), *peers()]


# ---- correctness ----------------------------------------------------------------------------------------


def errors(case: Case, inputs: Inputs, true: Truth, result: Result) -> Errors:
    """value: the worst, relative to max(1, |value|). dhidden, dweight: relative RMS. NaN where one is NaN."""
    value, dhidden, dweight = result
    got = value.double()
    if case.loss is None:  # what stands where a token is ignored is nobody's business but the loss's
        got = torch.where(inputs.target == IGNORE, true.value, got)
    off = (got - true.value).abs() / true.value.abs().clamp(min=1)
    found = {"value": off.max().item()}
    for name, gradient, at, expected in (
        ("dhidden", dhidden, true.rows, true.dhidden), ("dweight", dweight, true.cols, true.dweight)
    ):  # fmt: skip
        if gradient is not None:
            size = expected.norm()
            off = (gradient[at].double() - expected).norm()
            found[name] = (off / size if size else off).item()  # where all is zero, it must be zero
    return found


def limits(case: Case, inputs: Inputs, rounded: bool = False) -> Errors:
    """The errors that a provider may have: 1e-5 in float32; in 16 bit 1e-4 for log-probs and losses, and for
    gradients those of eager code that casts to float32 first.

    rounded: in 16 bit those of eager code whose logits are rounded. The error of a loss is a sum of its
    log-probs' errors, of either sign, so that code may by chance have none: a loss may be as far off as its
    log-probs are.
    """
    if case.dtype == "float32":
        return dict.fromkeys(("value", "dhidden", "dweight"), EXACT)
    if case.rows > FEW_ROWS:
        case, inputs = _first(case, inputs, FEW_ROWS)

    def of(case: Case) -> Errors:
        eager = EAGER if rounded else WIDE_EAGER
        return errors(case, inputs, truth(case, inputs), eager.build(case, inputs)())

    found = of(case) if case.grad_hidden else {}
    scoring = replace(case, mode="score", dead=0.0, dead_by="sequences")
    found["value"] = of(scoring)["value"] if rounded else VALUE / SLACK
    return {name: SLACK * error for name, error in found.items()}


def beyond(found: Errors, allowed: Errors) -> str | None:
    """None if no error is above its limit, else a sentence. NaN is above any."""
    over = [
        f"{name} {error:.1e} (limit {allowed[name]:.1e})"
        for name, error in found.items()
        if not error <= allowed[name]
    ]
    return f"beyond the gate: {', '.join(over)}" if over else None


def _first(case: Case, inputs: Inputs, rows: int) -> tuple[Case, Inputs]:
    """The case of the first rows only."""
    tokens = {"hidden", "target", "coefficients", "ref_logp", "old_logp"}
    part: dict = {name: getattr(inputs, name)[:rows] for name in tokens}
    part |= {name: getattr(inputs, name)[: rows // SEQUENCE] for name in ("advantage", "desirable")}
    part["true"] = Log(inputs.true.logp[:rows], inputs.true.lse[:rows])
    part["cu_seqlens"] = inputs.cu_seqlens[: rows // SEQUENCE + 1]
    return replace(case, rows=rows), replace(inputs, **part)


# ---- time -----------------------------------------------------------------------------------------------


def bare(inputs: Inputs, dz: Tensor, rows: int) -> dict[int, Callable[[], object]]:
    """The GEMMs of 1 to 4 passes over so many rows: logits, dhidden, dweight, logits again."""
    hidden, weight, dz = inputs.hidden.detach()[:rows], inputs.weight.detach(), dz[:rows]
    logits = lambda: torch.mm(hidden, weight.t())  # noqa: E731
    steps = (logits, lambda: torch.mm(dz, weight), lambda: torch.mm(dz.t(), hidden), logits)

    def gemms(passes: int) -> Callable[[], object]:
        def run() -> None:
            for step in steps[:passes]:
                step()

        return run

    return {passes: gemms(passes) for passes in (1, 2, 3, 4)}


def timed(run: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def in_turn(calls: dict[object, Callable[[], object]], settings: Settings) -> dict[object, list[float]]:
    """Seconds of every call in every round; each round begins with another one."""
    times: dict[object, list[float]] = {key: [] for key in calls}
    order, done = list(calls), 0
    while not settings.enough(done):
        at = done % len(order)
        for key in order[at:] + order[:at]:
            times[key].append(timed(calls[key], settings.device))
        done += 1
    return times


# ---- memory ---------------------------------------------------------------------------------------------


def peak_bytes(case: Case, provider: Provider, call: Call, device: str) -> int | None:
    """Bytes that one call takes at its peak beyond its inputs, outputs included; None where unknown.

    On a CPU in a process of its own, where nothing else has warmed the allocator: None outside Linux.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    if platform.system() != "Linux":
        return None
    given = json.dumps({"case": case.fields(), "provider": provider.name})
    command = [sys.executable, "-m", "bench", "peak", given]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {provider.name} failed:\n{done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def peak_here(case: Case, provider: Provider) -> int:
    """Peak bytes of one call in this process, a fresh one, beyond what it holds before. Linux, CPU."""
    call = provider.build(case, _inputs_for(provider, case, "cpu"))
    # Compiles, and lets the GEMM library take its packing buffers: some 70 MiB that it keeps from the first
    # large product on, whoever asks for it. What this package keeps between calls is freed, and so counted.
    call()
    fa.release_workspace()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # pages that were freed but kept would hide what the call takes
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM") - before
    del result
    return peak


def _status(field: str) -> int:
    """Bytes that /proc/self/status gives for a field."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


# ---- one case -------------------------------------------------------------------------------------------


@dataclass
class Entry:
    """A provider on its way through a case. call is None if it failed; the row then says how."""

    provider: Provider
    call: Call | None
    row: Row


def _inputs_for(provider: Provider, case: Case, device: str) -> Inputs:
    inputs = make_inputs(case, device)
    return without_reference(inputs) if provider.without_reference(case) else inputs


@lru_cache(maxsize=2)  # with and without reference log-probs
def _expected(case: Case, device: str, without: bool) -> Truth:
    """What the providers of a case are held against."""
    inputs = make_inputs(case, device)
    return truth(case, without_reference(inputs) if without else inputs)


@lru_cache(maxsize=4)
def _allowed(case: Case, device: str, without: bool, rounded: bool) -> Errors:
    """How far off they may be."""
    inputs = make_inputs(case, device)
    return limits(case, without_reference(inputs) if without else inputs, rounded)


def run_case(case: Case, chosen: list[Provider], settings: Settings, say: Say) -> list[Row]:
    """One row per provider that serves the case; `say` is told why another does not.

    A provider that fails, this package's beyond the gate too, has a row with "failed" and no times.
    """
    device = settings.device
    torch.compiler.reset()  # after some cases a function would meet torch's limit of compiled variants
    entries = []
    for provider in sorted(chosen, key=lambda p: (not p.ours, p.compiled)):
        reason = provider.why_not(device) or provider.supports(case, device)
        if settings.late and not provider.ours:
            reason = reason or f"not run on {case.label}: the time is up"
        if reason is None:
            try:
                entries.append(_gated(case, provider, settings))
            except ValueError as error:
                # a plan asked for by name says so where the budget is too small for it
                if not (provider.ours and "cannot serve" in str(error)):
                    raise
                reason = str(error)
        if reason is not None and not (provider.ours and "does not serve" in reason):
            say(f"{provider.name}: {reason}")
    running = [(entry, entry.call) for entry in entries if entry.call is not None]
    if running:
        _time(case, make_inputs(case, device), running, settings)
    for entry, call in running if settings.memory else []:
        if settings.late:
            break
        raw = _tried(entry, lambda entry=entry, call=call: peak_bytes(case, entry.provider, call, device))
        outputs = (
            case.torch_dtype.itemsize
            * case.hidden
            * (case.rows * case.grad_hidden + case.vocab * case.grad_weight)
        )
        entry.row |= {"peak_bytes": raw, "peak_extra_bytes": None if raw is None else raw - outputs}
    return [entry.row for entry in entries]


def _gated(case: Case, provider: Provider, settings: Settings) -> Entry:
    """The provider's first two calls of a case, with its errors in a row."""
    device = settings.device
    row: Row = {
        **case.fields(), "live_rows": case.live_rows, "provider": provider.name,
        "workspace_mib": provider.workspace_mib if isinstance(provider, Ours) else None,
        "tile": provider.tile if isinstance(provider, Ours) else None,
        "passes": provider.passes(case), **about(provider, device), "note": provider.note_on(case),
    }  # fmt: skip
    inputs = _inputs_for(provider, case, device)
    without = provider.without_reference(case)
    true, allowed = _expected(case, device, without), _allowed(case, device, without, provider.rounded)
    wait = math.inf if provider.ours else min(PATIENCE, settings.deadline - time.monotonic())
    try:
        with patience(wait if settings.deadline < math.inf else math.inf):
            call = provider.build(case, inputs)
            result = call()
            seconds = timed(call, device)  # the first call may have compiled something
    except (Exception, TooLong) as error:
        if provider.ours and "cannot serve" in str(error):
            raise
        # a failure is a result: the row says so, and the others are still measured
        row["failed"] = sentence(error)
    if "failed" in row:  # outside the handler, whose traceback holds the call's tensors
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        return Entry(provider, None, row)
    if seconds > settings.max_seconds and not provider.ours:
        text = f"one call takes {seconds:.0f} s, more than the {settings.max_seconds:g} s worth waiting for"
        return Entry(provider, None, {**row, "failed": text})
    found = errors(case, inputs, true, result)
    bad = beyond(found, allowed)
    if bad and provider.ours:
        return Entry(provider, None, {**row, "failed": bad})
    row["dead_measured"] = 1 - true.coefficients.count_nonzero().item() / case.live_rows
    row |= {f"error_{name}": error for name, error in found.items()}
    row["note"] = "; ".join(part for part in (row["note"], bad) if part)
    return Entry(provider, call, row)


def sentence(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def _tried(entry: Entry, call: Callable[[], T]) -> T | None:
    """What a call gives; None where it fails, or has failed before: the row says so."""
    if "failed" in entry.row:
        return None
    try:
        return call()
    except Exception as error:
        entry.row["failed"] = sentence(error)
        return None


def _time(case: Case, inputs: Inputs, entries: list[tuple[Entry, Call]], settings: Settings) -> None:
    """Adds the times and ratios to the rows of the entries."""
    dz = torch.empty(case.rows, case.vocab, dtype=case.torch_dtype, device=settings.device)
    dz.normal_(generator=torch.Generator(settings.device).manual_seed(4))
    wanted = {entry.provider.passes(case) for entry, _ in entries}
    calls: dict[object, Callable[[], object]] = {}
    for rows in sorted({case.rows, case.live_rows}):
        gemms = bare(inputs, dz, rows)
        calls |= {(rows, passes): gemms[passes] for passes in sorted(wanted)}
    for run in calls.values():
        run()
    for entry, call in entries:
        calls[entry.provider.name] = lambda entry=entry, call=call: _tried(entry, call)
    times = in_turn(calls, settings)
    middle = {key: statistics.median(seconds) for key, seconds in times.items()}
    for entry, _ in entries:
        if "failed" in entry.row:
            continue
        name, passes = entry.provider.name, entry.provider.passes(case)
        cuts = statistics.quantiles(times[name], n=5, method="inclusive")
        full, live = middle[case.rows, passes], middle[case.live_rows, passes]
        entry.row |= {
            "rounds": len(times[name]), "seconds": middle[name],
            "seconds_p20": cuts[0], "seconds_p80": cuts[-1],
            "bare_seconds": full, "bare_live_seconds": live,
            "ratio": middle[name] / full, "ratio_live": middle[name] / live,
        }  # fmt: skip


# ---- where it ran ---------------------------------------------------------------------------------------


def about(provider: Provider, device: str) -> Row:
    """Versions, device, commit and date."""
    # of this package not from metadata: it may run from a checkout that is not installed
    version = fa.__version__ if provider.ours else importlib.metadata.version(provider.package)
    return {
        "package": provider.package, "version": version,
        "python": platform.python_version(), "torch": torch.__version__, "device": device_name(device),
        "cuda": torch.version.cuda, "triton": _version("triton"),
        "threads": torch.get_num_threads(), "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The short hash of HEAD, "-dirty" if the tree differs; results that a run appends to do not count."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
        return done.stdout.strip() if done.returncode == 0 else ""

    revision = git("rev-parse", "--short", "HEAD")
    if not revision:
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!bench/results")
    return f"{revision}-dirty" if changed else revision
