"""What rows become: Markdown tables, a comparison of two runs, a plot. The same rows give the same text."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

import fused_align as fa
from fused_align.backends.operands import Head
from fused_align.linear.ops import make_problem
from fused_align.linear.plan import choose
from fused_align.losses.policy import PolicyLoss

from .cases import MODES, Case

Row = dict[str, Any]
CASE = tuple(field.name for field in fields(Case))
SETTING = tuple(name for name in CASE if name != "mode")
MIB, GIB = 2**20, 2**30
KERNEL = "kernel"  # the mode of rows of bench/kernels.py
STEP = "-step"  # how the modes of rows of bench/steps.py end
TRAINED = ("sequences", "length", "lora_r", "gradient_checkpointing")  # of those rows, what else sets them


def read(path: str | Path) -> list[Row]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]


def append(path: Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def latest(rows: list[Row]) -> list[Row]:
    """The last row of each case, provider and device, by setting, mode, and providers as they came."""
    names = (*CASE, "provider", "device", *TRAINED)
    last = {tuple(row.get(name) for name in names): row for row in rows}
    first: dict[object, int] = {}
    for row in rows:
        first.setdefault(row["provider"], len(first))
    return sorted(
        last.values(),
        key=lambda row: (str(row["device"]), *_setting_order(row), _mode_order(row), first[row["provider"]]),
    )  # fmt: skip


def _mode_order(row: Row) -> int:
    return MODES.index(row["mode"]) if row["mode"] in MODES else len(MODES)


def _setting_order(row: Row) -> tuple:
    return (
        row["shape"],
        row["rows"],
        row["dtype"],
        row["logits"],
        -float(row["live"]),
        row["dead_by"],
        row["dead"],
    )


# ---- tables ---------------------------------------------------------------------------------------------

COLUMNS = ("mode", "provider", "G", "seconds", "p20-p80", "ratio", "extra MiB", "value", "gradients", "note")
KERNEL_COLUMNS = (
    "kernel",
    "backend",
    "µs",
    "p20-p80",
    "host µs",
    "MiB",
    "GB/s",
    "share of copy",
    "error",
    "note",
)


def columns(rows: list[Row]) -> tuple[str, ...]:
    """The columns of rows that are all of kernels, all of training steps, or all of cases.

    GB, of training steps: tokens of the longest batch that fits into them, and its tokens per second.
    """
    if rows and rows[0]["mode"].endswith(STEP):
        limits = sorted({float(limit) for row in rows for limit in row["fits"]})
        plain = ("mode", "provider", "s/step", "p20-p80", "tokens/s", "peak GiB")
        return (*plain, *(f"{limit:g} GB" for limit in limits), "note")
    return KERNEL_COLUMNS if rows and rows[0]["mode"] == KERNEL else COLUMNS


def holds(row: Row) -> bool | None:
    """Whether a row is within what was promised of it; None if nothing was."""
    if row.get("most_seconds"):
        return row["seconds"] < row["most_seconds"]
    return row.get("ratio_live", row["ratio"]) <= row["bound"] if row.get("bound") else None


def _kernel_cells(row: Row) -> list[str]:
    """A row as the texts of KERNEL_COLUMNS. host: what the launch takes before the device may begin."""
    backend, _, kernel = str(row["provider"]).partition(":")
    if row.get("failed"):
        return [kernel, backend, *[""] * (len(KERNEL_COLUMNS) - 3), f"failed: {row['failed']}"]
    micro = [
        f"{float(row[name]) * 1e6:.1f}" for name in ("seconds", "seconds_p20", "seconds_p80", "host_seconds")
    ]
    moved, held = float(row["moved_bytes"]), holds(row)
    verdict = "" if held is None else "holds" if held else "does NOT hold"
    return [
        kernel, backend, micro[0], f"{micro[1]}-{micro[2]}", micro[3], f"{moved / MIB:.3g}",
        f"{moved / float(row['seconds']) / 1e9:.0f}", f"{1 / float(row['ratio']):.2f}",
        f"{row['error_value']:.1e}", ", ".join(filter(None, (row.get("note"), verdict))),
    ]  # fmt: skip


def _step_cells(row: Row, names: tuple[str, ...]) -> list[str]:
    found = {"mode": row["mode"].removesuffix(STEP), "provider": row["provider"]}
    if "seconds" in row:
        found |= {
            "s/step": f"{row['seconds']:.3g}",
            "p20-p80": f"{row['seconds_p20']:.3g}-{row['seconds_p80']:.3g}",
            "tokens/s": f"{row['tokens_per_second']:.0f}",
        }
    if row.get("peak_bytes"):
        found["peak GiB"] = f"{row['peak_bytes'] / GIB:.1f}"
    for limit, fit in row["fits"].items():
        speed = f" ({fit['tokens_per_second']:.0f}/s)" if fit["tokens"] else ""
        found[f"{float(limit):g} GB"] = f"{'>= ' if fit['at_least'] else ''}{fit['tokens']}{speed}"
    failed = f"failed: {row['failed']}" if row.get("failed") else None
    found["note"] = "; ".join(filter(None, (row["note"], failed)))
    return [found.get(name, "") for name in names]


def cells(row: Row, names: tuple[str, ...] = COLUMNS) -> list[str]:
    """A row as the texts of its columns. ratio is to the bare GEMMs of the live rows."""
    if row["mode"] == KERNEL:
        return _kernel_cells(row)
    if row["mode"].endswith(STEP):
        return _step_cells(row, names)
    if row.get("failed"):
        blank = [""] * (len(COLUMNS) - 4)
        return [
            str(row["mode"]),
            str(row["provider"]),
            str(row["passes"]),
            *blank,
            f"failed: {row['failed']}",
        ]
    gradients = [float(row[name]) for name in ("error_dhidden", "error_dweight") if name in row]
    extra = row.get("peak_extra_bytes")
    return [
        str(row["mode"]), str(row["provider"]), str(row["passes"]), f"{row['seconds']:.3g}",
        f"{row['seconds_p20']:.3g}-{row['seconds_p80']:.3g}", f"{row['ratio_live']:.2f}",
        "" if extra is None else f"{float(extra) / MIB:.0f}",
        f"{row['error_value']:.1e}", f"{max(gradients):.1e}" if gradients else "", str(row.get("note") or ""),
    ]  # fmt: skip


def setting(row: Row) -> str:
    """One line that says what a table is of."""
    if row["mode"].endswith(STEP):
        parts = [f"{row['shape']}: {row['sequences']} sequences of {row['length']} tokens", row["dtype"]]
        parts += [f"LoRA of rank {row['lora_r']}"] * bool(row["lora_r"])
        return ", ".join([*parts, *["gradient checkpointing"] * row["gradient_checkpointing"]])
    parts = [f"{row['shape']}: {row['rows']} x {row['hidden']} x {row['vocab']}", row["dtype"], row["logits"]]
    if row["live"] != 1:
        parts.append(f"live share {row['live']:g}")
    if row["dead"]:
        parts.append(f"zero coefficients {row['dead']:g} by {row['dead_by']}")
    return ", ".join(str(part) for part in parts)


def by_setting(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each table, as they come."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name) for name in ("device", *SETTING, *TRAINED)), []).append(row)
    return list(groups.values())


def markdown(rows: list[Row]) -> str:
    """One table per setting, and a line that says where it ran."""
    parts = []
    for group in by_setting(latest(rows)):
        names = columns(group)
        numbers = [name not in ("mode", "provider", "kernel", "backend", "note") for name in names]
        lines = [f"**{setting(group[0])}**", "", _line(names)]
        lines.append(_line(["---:" if right else "---" for right in numbers]))
        lines += [_line(text.replace("|", "\\|") for text in cells(row, names)) for row in group]
        parts.append("\n".join([*lines, "", ran(group)]))
    return "\n\n".join(parts)


def ran(rows: list[Row]) -> str:
    """Where and when rows were measured."""

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(row[name]) for row in rows if row.get(name) is not None}))

    versions = sorted({f"{row['package']} {row['version']}" for row in rows if row["package"] != "torch"})
    about = [
        all_of("device"), f"{all_of('threads')} threads", f"torch {all_of('torch')}",
        *([f"triton {all_of('triton')}"] if all_of("triton") else []), *versions,
        f"commit {all_of('commit')}", f"medians of {all_of('rounds')} rounds",
    ]  # fmt: skip
    return f"{', '.join(about)}."


def _line(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def write_between(path: Path, name: str, text: str) -> None:
    """Replaces what stands in a file between <!-- bench:name --> and <!-- /bench:name -->.

    Raises:
        ValueError: the markers are not in the file, once each and in this order.
    """
    begin, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    old = path.read_text()
    if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
        raise ValueError(f"{path} must have the line {begin} and after it {end}, once each.")
    head, tail = old[: old.index(begin) + len(begin)], old[old.index(end) :]
    path.write_text(f"{head}\n{text}\n{tail}")


# ---- the registry ----------------------------------------------------------------------------------------


def losses() -> str:
    """Every loss of the package as a table: what it couples, and the plan and passes that follow from it.

    Plans are the planner's for 2048 tokens of SmolLM2's head in float32 on a CPU, in sequences of 64.
    """
    columns = ("loss", "", "paper", "couples", "anchor", "trainable head", "frozen", "Humanline", "rows")
    lines = [_line(columns), _line(["---"] * len(columns))]
    for cls in fa.Loss.registry.values():
        loss = cls()
        shared = PolicyLoss.__dataclass_fields__ if isinstance(loss, PolicyLoss) else {}
        own = [f.name for f in fields(cls) if f.init and f.name not in shared] + ["..."] * bool(shared)
        title = re.split(r"[:(\n]", cls.__doc__ or "")[0].strip()
        paper = (
            f"[{loss.paper}](https://arxiv.org/abs/{loss.paper})" if loss.paper[:1].isdigit() else loss.paper
        )
        plans = (plan_of(loss, grad_head=head) for head in (True, False))
        humanline = "yes" if loss.anchors else "no"
        cells = f"`{loss.name}({', '.join(own)})`", title, paper, loss.item, loss.anchor or "", *plans
        lines.append(_line((*cells, humanline, loss.rows or "none")))
    return "\n".join(lines)


def plan_of(loss: fa.Loss, *, grad_head: bool) -> str:
    """The plan that "auto" takes, and its passes: "window 3 G"."""
    tokens, size = 2048, 64
    per = {"sequence": size, "pair": 2 * size}.get(loss.item)
    head = Head(torch.empty(49152, 576, device="meta"), None)
    problem = make_problem(
        head, torch.empty(tokens, 576, device="meta"), tokens, stats=loss.reads, learnt=loss.learnt,
        grad_hidden=True, grad_head=grad_head, coupling=loss.item,
        sizes=(per,) * (tokens // per) if per else (),
    )  # fmt: skip
    problem = replace(problem, device=torch.device("cpu"))
    chosen = choose(problem)
    return f"{chosen.name} {sum(problem.passes(chosen.name, chosen.rows, chosen.apart)):g} G"


# ---- comparison -----------------------------------------------------------------------------------------


def compare(before: list[Row], after: list[Row]) -> list[Row]:
    """Per case and provider in both: the change of the ratio and of the memory in percent, and both errors.

    The ratio is the median over the rows of a file that are of the same case and provider.
    """

    def by_key(rows: list[Row]) -> dict[tuple, list[Row]]:
        found: dict[tuple, list[Row]] = {}
        for row in rows:
            if not row.get("failed") and "ratio" in row:
                found.setdefault((*(row[name] for name in CASE), row["provider"]), []).append(row)
        return found

    old, new, found = by_key(before), by_key(after), []
    for key in old.keys() & new.keys():
        a, b = old[key], new[key]
        found.append(
            {
                **{name: b[-1][name] for name in (*CASE, "provider", "device")},
                "ratio_before": _middle(a, "ratio"), "ratio_after": _middle(b, "ratio"),
                "ratio_change": _change(a, b, "ratio"),
                "memory_change": _change(a, b, "peak_bytes"),
                "error_before": _worst(a), "error_after": _worst(b),
            }
        )  # fmt: skip
    return latest(found)


def worse(changes: list[Row], percent: float) -> list[Row]:
    """Those whose ratio or memory grew by more than so many percent."""
    return [
        row
        for row in changes
        if any(float(row[name] or 0) > percent for name in ("ratio_change", "memory_change"))
    ]


def _middle(rows: list[Row], name: str) -> float | None:
    found = [float(row[name]) for row in rows if row.get(name) is not None]
    return statistics.median(found) if found else None


def _change(before: list[Row], after: list[Row], name: str) -> float | None:
    a, b = _middle(before, name), _middle(after, name)
    return None if a is None or b is None or a <= 0 else 100 * (b / a - 1)


def _worst(rows: list[Row]) -> float:
    names = ("error_value", "error_dhidden", "error_dweight")
    return max(float(row[name]) for row in rows for name in names if name in row)


# ---- plot -----------------------------------------------------------------------------------------------


def plot(rows: list[Row], path: Path) -> None:
    """Peak extra memory against time, one point per provider and setting, one panel per mode, log axes.

    A call whose peak is not above its outputs is drawn at 1 MiB.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    rows = [row for row in latest(rows) if row.get("peak_extra_bytes") is not None]
    if not rows:
        raise ValueError("There is nothing to plot: no row has both a time and a peak of memory.")
    modes = list(
        dict.fromkeys(str(row["mode"]) for row in sorted(rows, key=lambda r: MODES.index(str(r["mode"]))))
    )
    names = list(dict.fromkeys(str(row["provider"]) for row in rows))
    settings = list(dict.fromkeys(setting(row) for row in rows))
    colours = {name: pyplot.get_cmap("tab20")(index % 20) for index, name in enumerate(names)}
    markers = {text: "osD^vPX*<>"[index % 10] for index, text in enumerate(settings)}
    columns = min(3, len(modes))
    lines = -(-len(modes) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(4.6 * columns, 3.6 * lines + 1.5), squeeze=False)
    for axis in axes.flat[len(modes) :]:
        axis.remove()
    for axis, mode in zip(axes.flat, modes, strict=False):
        for row in (row for row in rows if row["mode"] == mode):
            extra = max(float(row["peak_extra_bytes"]) / MIB, 1.0)
            axis.scatter(
                row["seconds"], extra, color=colours[str(row["provider"])], marker=markers[setting(row)], s=45
            )
        axis.set(
            xscale="log", yscale="log", title=mode, xlabel="seconds (median)", ylabel="extra memory, MiB"
        )
        axis.grid(True, which="both", alpha=0.25)
    handles = [Line2D([], [], linestyle="", marker="o", color=colours[name], label=name) for name in names]
    handles += [
        Line2D([], [], linestyle="", marker=markers[text], color="grey", label=text) for text in settings
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize="small")
    figure.suptitle(f"{rows[0]['device']}, torch {rows[0]['torch']}")
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
