"""What measured rows say: whether what is promised holds, and what the planner should take by itself."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .cases import SKIPPING
from .report import CASE, MIB, Row, holds, setting

SLOWER = 1.02  # times another's: below it may be noise
OWN = re.compile(r"fused_align\[(\w+),(.*)\]")


def verdicts(rows: list[Row]) -> list[str]:
    """A line for each: bounds, accuracy, zero coefficients, peers, backends, the planner's choice, tiles,
    budgets."""
    done = [row for row in rows if "seconds" in row and "failed" not in row]
    parts = (_bounds, _accuracy, _skipping, _peers, fastest, _chosen, _tiles, _budgets)
    return [line for part in parts for line in part(done)]


def failures(rows: list[Row]) -> list[str]:
    """A line for each row of what could not be measured; a promise may be among them."""
    return [f"failed: {_what(row)}: {row['failed']}" for row in rows if row.get("failed")]


def _of(row: Row) -> str:
    return f"{row['mode']}, {setting(row)}, {row['device']}"


def _what(row: Row) -> str:
    return f"{row['provider']}, {_of(row)}"


def _case(row: Row) -> tuple:
    return (*(row[name] for name in CASE), row["device"])


def _grouped(rows: Iterable[Row], key: Callable[[Row], Any]) -> Iterator[list[Row]]:
    """Rows of equal keys, as the keys come."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault(key(row), []).append(row)
    yield from found.values()


def _own(row: Row) -> tuple[str, list[str]] | None:
    """Of a row of this package with float32 logits: its backend; its plan and what it was told besides."""
    named = OWN.fullmatch(str(row["provider"]))
    if named is None or "bf16" in named[2].split(","):
        return None
    return named[1], named[2].split(",")


def _named(rows: Iterable[Row]) -> list[Row]:
    """Those of this package by backends and plans by name, in tiles of the planner's size."""
    return [row for row in rows if (own := _own(row)) and own[0] != "auto" and not row.get("tile")]


# ---- what is promised -----------------------------------------------------------------------------------


def _bounds(rows: list[Row]) -> Iterator[str]:
    """Whether the best of those that a ratio was promised of holds it, and what the others have."""
    promised = (row for row in rows if row.get("bound") and "ratio_live" in row)
    for group in _grouped(promised, lambda row: (_case(row), row["bound"])):
        best, *others = sorted(group, key=lambda row: row["ratio_live"])
        verdict = "holds" if holds(best) else "does NOT hold"
        rest = "".join(f"; {row['ratio_live']:.3f} {row['provider']}" for row in others)
        yield f"{best['ratio_live']:.3f} <= {best['bound']:g} {verdict}: {_what(best)}{rest}"


def _accuracy(rows: list[Row]) -> Iterator[str]:
    """The largest errors of this package; each row was below the limits of `measure.limits` to be timed."""
    for group in _grouped((row for row in rows if _own(row)), lambda row: (row["dtype"], row["device"])):
        names = ("error_value", "error_dhidden", "error_dweight")
        given = [name for name in names if any(name in row for row in group)]
        worst = {name: max(row[name] for row in group if name in row) for name in given}
        found = ", ".join(f"{name.removeprefix('error_')} {error:.1e}" for name, error in worst.items())
        yield f"largest errors against float64: {found}: {group[0]['dtype']}, {group[0]['device']}"


def _skipping(rows: list[Row]) -> Iterator[str]:
    """How much faster gradients with a trainable head are where half of the coefficients are zero."""
    plain = {(_case(row), row["provider"]): row["seconds"] for row in rows if not row["dead"]}
    for row in rows:
        if row["dead"] != 0.5 or _own(row) is None or "error_dweight" not in row:
            continue  # with a frozen head it can be no more than 2 : 1.5
        same = _case({**row, "dead": 0.0, "dead_by": "sequences"}), row["provider"]
        if same in plain:
            times = plain[same] / row["seconds"]
            verdict = "holds" if times >= SKIPPING else "does NOT hold"
            yield f"{times:.2f} >= {SKIPPING:g} {verdict}, times as fast as with none zero: {_what(row)}"


def _peers(rows: list[Row]) -> Iterator[str]:
    """Whether something of this package is faster than each peer and takes no more memory than that one.

    Of a peer that is not beaten the note is given: it may do less, or less exactly.
    """
    for group in _grouped(rows, _case):
        own = [row for row in group if _own(row) and not row.get("tile")]
        peers = [row for row in group if OWN.fullmatch(str(row["provider"])) is None]
        if not own or not peers:
            continue
        won, lost, left = 0, [], []
        for peer in peers:
            room = peer.get("peak_extra_bytes")
            known = [row for row in own if row.get("peak_extra_bytes") is not None]
            if room is None or not known:
                left.append(str(peer["provider"]))
                continue
            within = [row["seconds"] for row in known if row["peak_extra_bytes"] <= room]
            times = min(within) / peer["seconds"] if within else math.inf
            won += times < 1
            if times >= 1:
                much = f"{times:.2f} of its time" if within else "nothing is"
                note = f"; {peer['note']}" if peer.get("note") else ""
                lost.append(f"{peer['provider']} ({much} within its {room / MIB:.0f} MiB{note})")
        parts = [f"does NOT hold for {', '.join(lost)}"] * bool(lost) + [f"holds for {won}"] * bool(won)
        parts += [f"memory was not measured of {', '.join(left)}, or not here"] * bool(left)
        yield f"faster than a peer at no more memory: {'; '.join(parts)}: {_of(group[0])}"


# ---- what the package should take by itself -------------------------------------------------------------


def fastest(rows: list[Row]) -> Iterator[str]:
    """Per case the backends of this package from the fastest on, each by its best plan; then cuda's times and
    triton's by the same plans. What "auto" should take first follows from it."""
    same: dict[tuple[str, object], float] = {}
    for group in _grouped(_named(rows), _case):
        best: dict[str, tuple[float, str]] = {}
        for row in group:
            backend, plan = OWN.fullmatch(str(row["provider"])).groups()  # type: ignore[union-attr]
            best[backend] = min(best.get(backend, (math.inf, "")), (float(row["seconds"]), plan))
            at = backend, f"{plan}: {_of(row)}"
            same[at] = min(same.get(at, math.inf), float(row["seconds"]))
        (name, (seconds, plan)), *others = sorted(best.items(), key=lambda item: item[1])
        rest = "".join(f"; {name} {other / seconds:.3f} ({by})" for name, (other, by) in others)
        if others:
            yield f"fastest: {name} {seconds * 1e3:.4g} ms ({plan}){rest}: {_of(group[0])}"
    yield from compared_times(same)


def compared_times(seconds: dict[tuple[str, Any], float]) -> list[str]:
    """How cuda's times and triton's compare, from seconds by backend and what was timed; [] without both."""
    ratios = {
        what: cuda / seconds["triton", what]
        for (name, what), cuda in seconds.items()
        if name == "cuda" and ("triton", what) in seconds
    }
    if not ratios:
        return []
    mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
    return [f"cuda takes {mean:.3f} of triton's time, the geometric mean of {len(ratios)}; {_longer(ratios)}"]


def _longer(ratios: dict[Any, float]) -> str:
    slower = [f"{what} ({ratio:.2f})" for what, ratio in ratios.items() if ratio > SLOWER]
    return f"longer in {len(slower)}: {'; '.join(slower)}" if slower else "longer in none"


def _chosen(rows: list[Row]) -> Iterator[str]:
    """How "auto" compares with the fastest of the backends and plans by name in the same workspace."""
    ratios = {}
    for group in _grouped(rows, lambda row: (_case(row), row.get("workspace_mib"))):
        named = _named(group)
        for row in group:
            if (own := _own(row)) and own[0] == own[1][0] == "auto" and named and not row.get("tile"):
                best = min(named, key=lambda row: row["seconds"])
                ratios[f"{_what(row)}: {best['provider']}"] = row["seconds"] / best["seconds"]
    if ratios:
        yield f"auto, against the fastest plan by name in {len(ratios)} cases: {_longer(ratios)}"


def _tiles(rows: list[Row]) -> Iterator[str]:
    """Which size of tiles is the fastest, and how much faster than the planner's own."""

    def untiled(row: Row) -> tuple:
        own = _own(row)
        return (_case(row), own[0], own[1][0], row.get("workspace_mib")) if own else (row["provider"],)

    for group in _grouped(rows, untiled):
        sizes = {tuple(row["tile"]): row["seconds"] for row in group if row.get("tile")}
        usual = [row for row in group if not row.get("tile")]
        if sizes and usual:
            best = min(sizes, key=lambda size: sizes[size])
            share = sizes[best] / usual[0]["seconds"]
            yield f"tiles of {best[0]} rows and {best[1]} MiB take {share:.3f} of the time: {_what(usual[0])}"


def _budgets(rows: list[Row]) -> Iterator[str]:
    """What "auto" takes in each workspace, as multiples of the fastest; 0: in the one it takes by itself."""
    given = [
        row for row in rows if (own := _own(row)) and own[0] == own[1][0] == "auto" and not row.get("tile")
    ]
    for group in _grouped(given, _case):
        seconds = {row.get("workspace_mib") or 0: row["seconds"] for row in group}
        best = min(seconds.values())
        if len(seconds) > 2:
            each = ", ".join(f"{mib}: {seconds[mib] / best:.3f}" for mib in sorted(seconds))
            yield f"workspaces in MiB, and their times over the least: {each}: {_of(group[0])}"
