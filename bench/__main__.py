"""`python -m bench run | step | check | compare | plot | table`: see --help of each."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fused_align import backends

from . import kernels, report, steps
from .cases import DEAD_BY, DTYPES, MODES, SHAPES, SUITES, Case, Suite
from .measure import MIN_ROUNDS, Settings, peak_here, providers, run_case
from .providers import Ours, Provider
from .reference import SEQUENCE
from .verdicts import failures, verdicts

RESULTS = Path(__file__).parent / "results"


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of the globs matches. * and ? are wild; brackets stand in names and mean themselves."""
    return any(fnmatchcase(name, pattern.replace("[", "[[]")) for pattern in patterns)


def find(name: str, device: str) -> Provider:
    """A provider by its full name, its workspace and tiles included."""
    sized = re.fullmatch(r"(.*?)(?:,(\d+)MiB)?(?:,(\d+)rows x (\d+)MiB)?\]", name)
    for provider in providers(device):
        if provider.name == name:
            return provider
        if isinstance(provider, Ours) and sized and provider.name == f"{sized[1]}]":
            provider = provider.with_workspace(int(sized[2])) if sized[2] else provider
            return provider.with_tile((int(sized[3]), int(sized[4]))) if sized[3] else provider
    raise ValueError(f"There is no provider {name!r}.")


def chosen(
    suite: Suite, patterns: list[str] | None, workspaces: Iterable[int | None], device: str
) -> list[Provider]:
    """The suite's providers, or those asked for; this package's once per workspace and size of tiles."""
    found: list[Provider] = []
    for provider in providers(device):
        if not matches(provider.name, patterns or suite.providers):
            continue
        if not isinstance(provider, Ours):
            found.append(provider)
            continue
        for mib, tile in product(workspaces, suite.tiles):
            sized = provider if mib is None else provider.with_workspace(mib)
            found.append(sized if tile is None else sized.with_tile(tile))
    return found


def cases_of(suite: Suite, args: argparse.Namespace) -> list[Case]:
    """The suite's cases, on the shape, dtype, logits and modes that the arguments ask for."""
    changes: dict = {}
    if args.shape and args.shape not in {case.shape for case in suite.cases}:
        hidden, vocab = SHAPES[args.shape]
        changes = {"shape": args.shape, "hidden": hidden, "vocab": vocab}
    given = {"rows": args.rows, "hidden": args.hidden, "vocab": args.vocab}
    changes |= {name: value for name, value in given.items() if value is not None}
    if args.hidden or args.vocab:
        changes["shape"] = "custom"
    names = ("dtype", "logits", "live", "dead", "dead_by")
    changes |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    wanted = [case for case in suite.cases if matches(case.mode, args.modes or ["*"])]
    return list(dict.fromkeys(replace(case, **changes) for case in wanted))


@dataclass(frozen=True)
class Job:
    """One case with the providers that compute it."""

    case: Case
    using: list[Provider]
    bound: float | None

    def promised(self, row: report.Row) -> bool:
        names = tuple(f"fused_align[{name}," for name in backends.KERNELS)
        return self.bound is not None and str(row["provider"]).startswith(names)


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """What is to be measured, in this order.

    Raises:
        ValueError: nothing matches.
    """
    whole, found = SUITES[args.suite], []
    if args.shape and whole.parts:
        heads = sorted({part.cases[0].shape for part in whole.parts})
        if args.shape not in heads:
            raise ValueError(f"The suite {args.suite!r} has the heads {heads}; got --shape {args.shape}.")
        whole = whole.of_shape(args.shape)
    for suite in whole.parts or (whole,):
        workspaces = [args.workspace_mib] if args.workspace_mib else suite.workspaces
        using = chosen(suite, args.providers, workspaces, args.device)
        found += [Job(case, using, suite.bound) for case in cases_of(suite, args) if using]
    if not found:
        names = [provider.name for provider in providers(args.device)]
        raise ValueError(
            f"The suite {args.suite!r} has no mode that matches {args.modes or '*'}, or no provider matches "
            f"{args.providers or '*'}; there are {names}."
        )
    return found


def run(args: argparse.Namespace, console: Console) -> int:
    limited = args.minutes if args.minutes is not None else SUITES[args.suite].minutes
    rounds = args.rounds or (20 if limited else MIN_ROUNDS)
    if rounds < MIN_ROUNDS:
        raise ValueError(f"--rounds must be at least {MIN_ROUNDS}; got {rounds}.")
    out = Path(args.out) if args.out else RESULTS / f"{args.suite}.jsonl"
    begin = time.monotonic()
    deadline = begin + 60 * limited if limited else math.inf
    said: set[str] = set()

    def say(text: str) -> None:
        if text not in said:  # the same reason for the next case is no news
            console.print(f"  {text}", style="dim", markup=False, highlight=False)
        said.add(text)

    if args.suite == "kernels":
        return run_kernels(args, console, out, rounds, deadline)
    todo = jobs_of(args)
    for name, reason in kernels.reasons(args.device).items() if args.device == "cuda" else ():
        if reason is not None:
            say(f"backend {name}: {reason}")
    console.print(f"{args.suite}: {SUITES[args.suite].about}. {len(todo)} cases, on {args.device}.")
    # under a limit a call of a hundredth of it is not worth repeating
    longest = min(args.max_seconds, 0.6 * limited) if limited else args.max_seconds
    settings = Settings(args.device, rounds, not args.no_memory, longest, deadline=deadline)
    broken, found, left = [], [], []
    for index, job in enumerate(todo, 1):
        now, title = time.monotonic(), f"{index} of {len(todo)}: {job.case.label}"
        if now + 0.02 * 60 * limited > deadline:
            left.append(job)
            continue
        share = now + (deadline - now) / (len(todo) - index + 1)
        try:
            with console.status(title):
                rows = run_case(job.case, job.using, replace(settings, share=share), say)
        except Exception:  # of the benchmark itself: the next case may do
            broken.append(f"{job.case.label}: {traceback.format_exc()}")
            continue
        for row in rows:
            row |= {"bound": job.bound} if job.promised(row) else {}
        report.append(out, rows)
        found += rows
        broken += _absent(job, rows)
        console.print(table(title, rows))
    _conclude(console, found, broken, [f"{job.case.label}: {', '.join(_names(job))}" for job in left])
    console.print(f"{time.monotonic() - begin:.0f} s. Rows are in {out}.", markup=False)
    own = any("failed" in row and str(row["provider"]).startswith("fused_align") for row in found)
    return 1 if broken or own else 0


def run_kernels(args: argparse.Namespace, console: Console, out: Path, rounds: int, deadline: float) -> int:
    if args.rows is not None and (args.rows <= 0 or args.rows % (2 * SEQUENCE)):
        raise ValueError(f"--rows must be a multiple of {2 * SEQUENCE}, pairs of sequences; got {args.rows}.")
    llama = SHAPES[args.shape or "Llama-3-8B"]
    sizes = kernels.Sizes.of(args.rows or 16384, args.hidden or llama[0], args.vocab or llama[1], args.device)

    def wanted(name: str) -> bool:
        return matches(name, args.providers or ["*"])

    def say(text: str) -> None:
        console.print(text, style="yellow", markup=False, highlight=False)

    rows = []
    for row in kernels.run(sizes, wanted, rounds, deadline, say):
        report.append(out, [row])
        rows.append(row)
    console.print(table("kernels", rows))
    if args.candidates:
        tried = kernels.candidates(sizes, wanted)
        console.print(grid("block sizes", ("kernel", "blocks", "µs", "note"), tried))
    failed = [f"failed: {row['provider']}: {row['failed']}" for row in rows if "failed" in row]
    for line in kernels.summary(rows) + failed:
        say(line)
    console.print(f"Rows are in {out}.", markup=False)
    return 1 if failed else 0


def _names(job: Job) -> list[str]:
    """Those that compute the case, installed or not."""
    return [p.name for p in job.using if "does not serve" not in (p.supports(job.case, "cpu") or "")]


def _absent(job: Job, rows: list[report.Row]) -> list[str]:
    """Sentences about this package's plans that were promised and could not serve."""
    own = {provider.name for provider in job.using if provider.ours}
    absent = set(_names(job)) & own - {row["provider"] for row in rows} if job.bound else set()
    return [f"{name}, {job.case.label}: it was promised, and has no row" for name in sorted(absent)]


def _conclude(console: Console, rows: list[report.Row], broken: list[str], left: list[str]) -> None:
    """What the rows say, what failed, what there was no time for."""
    lines = verdicts(rows) + failures(rows)
    lines += [f"failed: {text}" for text in broken]
    lines += [f"not run, the time was up: {text}" for text in left]
    _print(console, lines)


def _print(console: Console, lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, style="yellow", markup=False, highlight=False)


def step(args: argparse.Namespace, console: Console) -> int:
    def show(title: str, rows: list[report.Row]) -> None:
        for group in report.by_setting(rows):
            console.print(table(f"{title}: {report.setting(group[0])}", group))

    return steps.run(args, console, show)


def check(args: argparse.Namespace, console: Console) -> int:
    rows = report.latest(_wanted(args))
    _print(console, verdicts(rows) + failures(rows))
    return 0


def table(title: str, rows: list[report.Row]) -> Table:
    names = report.columns(rows)
    return grid(title, names, (report.cells(row, names) for row in rows))


def grid(title: str, columns: Iterable[str], rows: Iterable[list[str]]) -> Table:
    found = Table(title=title, title_justify="left")
    texts = ("case", "mode", "provider", "kernel", "backend", "blocks", "note")
    for name in columns:
        found.add_column(name, justify="left" if name in texts else "right", overflow="fold")
    for row in rows:
        found.add_row(*(text.replace("[", "\\[") for text in row))  # brackets are markup to rich
    return found


def compare(args: argparse.Namespace, console: Console) -> int:
    changes = report.compare(report.read(args.before), report.read(args.after))
    if not changes:
        raise ValueError(f"{args.before} and {args.after} have no case and provider in common.")

    def percent(value: object) -> str:
        return "" if value is None else f"{value:+.1f} %"

    columns = ("case", "mode", "provider", "ratio", "change", "memory", "error")
    lines = [
        [
            report.setting(row), str(row["mode"]), str(row["provider"]),
            f"{row['ratio_before']:.2f} -> {row['ratio_after']:.2f}", percent(row["ratio_change"]),
            percent(row["memory_change"]), f"{row['error_before']:.1e} -> {row['error_after']:.1e}",
        ]
        for row in changes
    ]  # fmt: skip
    console.print(grid(f"{args.before} -> {args.after}", columns, lines))
    if args.fail_above is None:
        return 0
    bad = report.worse(changes, args.fail_above)
    if bad:
        console.print(
            f"{len(bad)} of {len(changes)} grew by more than {args.fail_above:g} % in ratio or memory."
        )
    return 1 if bad else 0


def plot(args: argparse.Namespace, console: Console) -> int:
    out = Path(args.out) if args.out else RESULTS / f"{Path(args.rows).stem}.png"
    report.plot(_wanted(args), out)
    console.print(f"Drawn in {out}.")
    return 0


def markdown(args: argparse.Namespace, console: Console) -> int:
    text = report.markdown(_wanted(args))
    if args.write:
        report.write_between(Path(args.write), args.name or Path(args.rows).stem, text)
    else:
        print(text)
    return 0


def _wanted(args: argparse.Namespace) -> list[report.Row]:
    return [
        row
        for row in report.read(args.rows)
        if matches(str(row["mode"]), args.modes or ["*"])
        and matches(str(row["provider"]), args.providers or ["*"])
    ]


def peak(args: argparse.Namespace, console: Console) -> int:
    given = json.loads(args.given)
    print(peak_here(Case(**given["case"]), find(given["provider"], "cpu")))
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m bench", description="Benchmarks of the losses and their peers."
    )
    commands = top.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run", help="measure the cases of a suite and append rows of JSON")
    suites = "; ".join(f"{name}: {suite.about}" for name, suite in SUITES.items())
    one.add_argument("--suite", default="smoke", choices=sorted(SUITES), help=suites)
    _filters(one)
    one.add_argument("--rounds", type=int, help="default: 5, or up to 20 where the suite has --minutes")
    one.add_argument(
        "--minutes",
        type=float,
        help="what it may take: first rounds are dropped, then the last cases; 0: any",
    )
    one.add_argument("--candidates", action="store_true", help="suite kernels: time Triton's block sizes")
    one.add_argument(
        "--shape",
        choices=sorted(SHAPES),
        help="the head of this model instead of the suite's, or of the suite's only this",
    )
    for name in ("rows", "hidden", "vocab"):
        one.add_argument(f"--{name}", type=int, help="instead of the suite's")
    one.add_argument("--dtype", choices=sorted(DTYPES))
    one.add_argument("--logits", choices=("randn", "peaked"))
    one.add_argument("--live", type=float, help="share of tokens that are not ignored")
    one.add_argument("--dead", type=float, help="share of zero coefficients")
    one.add_argument("--dead-by", choices=DEAD_BY, help="which are zero: see bench/cases.py")
    one.add_argument(
        "--max-seconds", type=float, default=60, help="a peer's longest call that is worth timing"
    )
    one.add_argument("--workspace-mib", type=int, help="budget of this package's workspace")
    one.add_argument("--no-memory", action="store_true", help="leave out the peaks of memory")
    one.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda")
    )
    one.add_argument("--out", help="file of rows; default: bench/results/<suite>.jsonl")
    one.set_defaults(do=run)
    one = commands.add_parser("compare", help="what changed between two files of rows")
    one.add_argument("before")
    one.add_argument("after")
    one.add_argument(
        "--fail-above", type=float, metavar="PCT", help="exit 1 if a ratio or a peak grew by more"
    )
    one.set_defaults(do=compare)
    one = commands.add_parser("step", help="time whole training steps, and find the longest batch that fits")
    steps.add_arguments(one)
    one.set_defaults(do=step)
    one = commands.add_parser(
        "check", help="what the latest rows say of what is promised, and of the planner"
    )
    one.add_argument("rows")
    _filters(one)
    one.set_defaults(do=check)
    one = commands.add_parser("plot", help="memory against time, a panel per mode")
    one.add_argument("rows")
    _filters(one)
    one.add_argument("--out", help="default: bench/results/<name of the rows>.png")
    one.set_defaults(do=plot)
    one = commands.add_parser("table", help="Markdown tables of the latest rows")
    one.add_argument("rows")
    _filters(one)
    one.add_argument(
        "--write", metavar="FILE", help="put them between <!-- bench:NAME --> and <!-- /bench:NAME -->"
    )
    one.add_argument("--name", help="NAME; default: that of the rows")
    one.set_defaults(do=markdown)
    one = commands.add_parser("losses", help="the README's table of losses, from the registry")
    one.add_argument("--write", metavar="FILE", help="put it between the markers <!-- bench:losses -->")
    one.set_defaults(do=losses)
    one = commands.add_parser("peak")  # what `run` starts for the memory of one call
    one.add_argument("given")
    one.set_defaults(do=peak)
    return top


def losses(args: argparse.Namespace, console: Console) -> int:
    text = report.losses()
    if args.write:
        report.write_between(Path(args.write), "losses", text)
    else:
        print(text)
    return 0


def _filters(command: argparse.ArgumentParser) -> None:
    command.add_argument("--providers", nargs="+", metavar="GLOB")
    command.add_argument("--modes", nargs="+", metavar="GLOB", help=f"of {', '.join(MODES)}")


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    try:
        return args.do(args, console)
    except ValueError as error:
        Console(stderr=True).print(
            f"bench {args.command}: {error}", style="red", markup=False, highlight=False
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
