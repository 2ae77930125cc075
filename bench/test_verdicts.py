"""What the verdicts make of rows."""

from __future__ import annotations

from typing import Any

from . import report, verdicts
from .test_tools import row_of


def lines_of(part: str, *rows: report.Row) -> list[str]:
    """The verdicts on these rows that begin like this."""
    return [line for line in verdicts.verdicts(list(rows)) if line.startswith(part)]


def test_the_fastest_backend_of_each_case_is_named() -> None:
    found = list(verdicts.fastest([
        row_of("fused_align[triton,score]", "score", seconds=0.2),
        row_of("fused_align[triton,fused]", "score", seconds=0.08),
        row_of("fused_align[cuda,score]", "score", seconds=0.1),
        row_of("fused_align[torch,score]", "score", seconds=0.3),
        row_of("fused_align[cuda,window,6144MiB]", "dpo", seconds=0.3),
        row_of("fused_align[triton,window,6144MiB]", "dpo", seconds=0.15),
        row_of("eager", "dpo", seconds=0.01), row_of("fused_align[cuda,single]", seconds=0.1),
        row_of("fused_align[auto,auto]", "dpo", seconds=0.01),
        row_of("fused_align[cuda,window,bf16]", "dpo", seconds=0.01),
    ]))  # fmt: skip
    setting = f"{report.setting(row_of())}, a CPU"
    assert found == [
        f"fastest: triton 80 ms (fused); cuda 1.250 (score); torch 3.750 (score): score, {setting}",
        f"fastest: triton 150 ms (window,6144MiB); cuda 2.000 (window,6144MiB): dpo, {setting}",
        "cuda takes 1.000 of triton's time, the geometric mean of 2; longer in 1: "
        f"window,6144MiB: dpo, {setting} (2.00)",
    ]


def test_bounds_are_held_by_the_best_of_what_was_promised() -> None:
    def promised(backend: str, ratio: float, mode: str = "score", **changes: Any) -> report.Row:
        return row_of(f"fused_align[{backend},{mode}]", mode, bound=1.08, ratio_live=ratio, **changes)

    rows = [promised("cuda", 1.09), promised("triton", 1.07), promised("cuda", 1.2, "sft")]
    off = promised("torch", 1.0, failed="it is off")
    found = lines_of("1.", *rows, off)
    assert verdicts.failures([*rows, off]) == [
        f"failed: fused_align[torch,score], score, {report.setting(off)}, a CPU: it is off"
    ]
    setting = f"{report.setting(row_of())}, a CPU"
    assert found == [
        f"1.070 <= 1.08 holds: fused_align[triton,score], score, {setting}; 1.090 fused_align[cuda,score]",
        f"1.200 <= 1.08 does NOT hold: fused_align[cuda,sft], sft, {setting}",
    ]


def test_the_largest_errors_are_named() -> None:
    rows = [
        row_of("fused_align[cuda,single]", error_value=3e-7, error_dweight=2e-6),
        row_of("fused_align[torch,single]", error_dhidden=5e-6), row_of("eager", error_value=1.0),
    ]  # fmt: skip
    frozen = row_of("fused_align[torch,jacobian]", "frozen", dtype="bfloat16")
    assert lines_of("largest errors", frozen)[0].endswith("value 1.0e-08, dhidden 3.0e-07: bfloat16, a CPU")
    assert lines_of("largest errors", *rows) == [
        "largest errors against float64: value 3.0e-07, dhidden 5.0e-06, dweight 2.0e-06: float32, a CPU"
    ]


def test_skipping_is_held_against_the_same_without_zeros() -> None:
    half: Any = {"dead": 0.5, "dead_by": "humanline", "error_dweight": 1e-7}
    rows = [
        row_of("fused_align[cuda,window]", "dpo", seconds=0.3),
        row_of("fused_align[cuda,window]", "dpo", seconds=0.2, **half),
        row_of("fused_align[triton,window]", "dpo", seconds=0.3),
        row_of("fused_align[triton,window]", "dpo", seconds=0.9, device="another"),
        row_of("fused_align[triton,window]", "dpo", seconds=0.25, **half),
        row_of("eager", "dpo", seconds=0.3), row_of("eager", "dpo", seconds=0.3, **half),
        row_of("fused_align[cuda,recompute]", "frozen", seconds=0.3),
        row_of("fused_align[cuda,recompute]", "frozen", seconds=0.3, dead=0.5),
        row_of("fused_align[torch,window]", "dpo", seconds=0.2, **half),
    ]  # fmt: skip
    setting = f"dpo, {report.setting(row_of(**half))}, a CPU"
    assert [line for line in verdicts.verdicts(rows) if ">=" in line] == [
        f"1.50 >= 1.4 holds, times as fast as with none zero: fused_align[cuda,window], {setting}",
        f"1.20 >= 1.4 does NOT hold, times as fast as with none zero: fused_align[triton,window], {setting}",
    ]


def test_a_peer_is_beaten_in_time_within_its_memory() -> None:
    rows = [
        row_of("fused_align[cuda,single,6144MiB]", seconds=0.1, peak_extra_bytes=6 << 30),
        row_of("fused_align[cuda,recompute,1024MiB]", seconds=0.15, peak_extra_bytes=1 << 30),
        row_of("fused_align[auto,auto,bf16]", seconds=0.01, peak_extra_bytes=0),
        row_of("trl", seconds=0.2, peak_extra_bytes=2 << 30),
        row_of("quack", seconds=0.12, peak_extra_bytes=2 << 30),
        row_of("cce", seconds=0.3, peak_extra_bytes=1 << 20),
        row_of("unknown", seconds=0.01, peak_extra_bytes=None),
    ]
    of = f"sft, {report.setting(row_of())}, a CPU"
    rows[4]["note"] = "it does less"
    elsewhere = row_of("trl", seconds=0.001, device="another")
    assert lines_of("faster than a peer", *rows, elsewhere) == [
        "faster than a peer at no more memory: does NOT hold for "
        "quack (1.25 of its time within its 2048 MiB; it does less), cce (nothing is within its 1 MiB); "
        f"holds for 1; memory was not measured of unknown, or not here: {of}"
    ]
    assert lines_of("faster than a peer", *rows[:4]) == [
        f"faster than a peer at no more memory: holds for 1: {of}"
    ]
    unmeasured = {**rows[0], "peak_extra_bytes": None}
    assert lines_of("faster than a peer", unmeasured, rows[3]) == [
        f"faster than a peer at no more memory: memory was not measured of trl, or not here: {of}"
    ]


def test_what_the_planner_takes_is_held_against_what_it_could() -> None:
    own: Any = {"workspace_mib": 1024}
    rows = [
        row_of("fused_align[auto,auto,1024MiB]", seconds=0.2, **own),
        row_of("fused_align[cuda,single,1024MiB]", seconds=0.1, **own),
        row_of("fused_align[cuda,single]", seconds=0.01, workspace_mib=None),
        row_of("fused_align[auto,auto]", "dpo", seconds=0.1, workspace_mib=None),
        row_of("fused_align[triton,window]", "dpo", seconds=0.1, workspace_mib=None),
    ]
    (line,) = lines_of("auto, against", *rows)
    assert line.startswith(
        "auto, against the fastest plan by name in 2 cases: longer in 1: fused_align[auto,"
    )
    assert line.endswith("fused_align[cuda,single,1024MiB] (2.00)")


def test_tiles_and_workspaces_are_compared() -> None:
    tiled: Any = {"tile": [4096, 32], "workspace_mib": None}
    rows = [
        row_of("fused_align[cuda,score]", "score", seconds=0.2, workspace_mib=None),
        row_of("fused_align[cuda,score,4096rows x 32MiB]", "score", seconds=0.1, **tiled),
        row_of(
            "fused_align[cuda,score,4096rows x 16MiB]", "score", seconds=0.3, **{**tiled, "tile": [4096, 16]}
        ),
    ]
    setting = f"{report.setting(row_of())}, a CPU"
    assert lines_of("tiles of", *rows) == [
        f"tiles of 4096 rows and 32 MiB take 0.500 of the time: fused_align[cuda,score], score, {setting}"
    ]
    rows = [
        row_of(f"fused_align[auto,auto,{mib}MiB]", seconds=seconds, workspace_mib=mib)
        for mib, seconds in ((4096, 0.1), (1024, 0.2), (2048, 0.11))
    ]
    (line,) = lines_of("workspaces", *rows, row_of("fused_align[auto,auto]", seconds=0.15))
    assert "over the least: 0: 1.500, 1024: 2.000, 2048: 1.100, 4096: 1.000: sft" in line
