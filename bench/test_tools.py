"""The benchmark's own tests: its reference, its gate, its tables, and every provider at a tiny size."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

if not torch.cuda.is_available():  # as tests/conftest.py has it; Triton looks when it is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import kernels as kernel_tests  # of tests/

from fused_align import backends
from fused_align.backends import torch_

from . import kernel_works, kernels, measure, providers, reference, report
from .cases import MODES, SUITES, Case, Inputs, make_inputs, without_reference
from .providers import Call, Ours, Provider

TINY = Case("tiny", 256, 16, 512, "float32", "randn", "sft")
QUICK = measure.Settings("cpu", memory=False)
ALL = {provider.name: provider for provider in measure.providers("cpu")}
COMPILED = [replace(TINY, mode=mode) for mode in ("trainable", "dpo", "grpo")]  # each takes seconds


def variants() -> list[Case]:
    """Every mode, plain; and each kind of mask and zero coefficient where there is one."""
    found = [replace(TINY, mode=mode) for mode in MODES]
    masked = ("score", "frozen", "trainable", "sft", "dpo", "ipo-frozen", "kto", "grpo", "gspo")
    found += [replace(TINY, mode=mode, live=0.25, logits="peaked") for mode in masked]
    found += [replace(TINY, mode=mode, dead=0.5) for mode in ("frozen", "trainable", "grpo")]
    modes = ("dpo", "ipo-frozen", "kto", "grpo")
    return found + [replace(TINY, mode=mode, live=0.5, dead=0.9, dead_by="humanline") for mode in modes]


def served() -> list[tuple[Case, str]]:
    """The variants that each provider serves."""
    return [
        (case, name)
        for name, provider in ALL.items()
        for case in (COMPILED if provider.compiled else variants())
        if provider.supports(case, "cpu") is None
    ]


def dense(case: Case, inputs: Inputs) -> tuple[Tensor, ...]:
    """Plain float64 autograd through full logits: value and gradients."""
    hidden, weight = inputs.hidden.double().requires_grad_(), inputs.weight.double().requires_grad_()
    live = inputs.target != reference.IGNORE
    nll = F.cross_entropy(hidden @ weight.t(), inputs.target, reduction="none", ignore_index=reference.IGNORE)
    if case.loss is None:
        value, c = -nll, inputs.coefficients.double() * live
    else:
        value, c = reference.loss_of(case.loss, -nll, inputs, case.humanline), None
    return (value.detach(), *torch.autograd.grad(value, (hidden, weight), c))


@pytest.mark.parametrize("case", variants(), ids=lambda case: case.label)
def test_truth_is_float64_autograd(case: Case) -> None:
    inputs = make_inputs(case, "cpu")
    true, (value, dhidden, dweight) = reference.truth(case, inputs), dense(case, inputs)
    torch.testing.assert_close(true.value, value, rtol=1e-10, atol=1e-10)
    if case.grad_hidden:
        torch.testing.assert_close(true.dhidden, dhidden[true.rows], rtol=1e-8, atol=1e-12)
    if case.grad_weight:
        torch.testing.assert_close(true.dweight, dweight[true.cols], rtol=1e-8, atol=1e-12)
    zero = 1 - true.coefficients.count_nonzero().item() / case.live_rows
    assert zero == pytest.approx(case.dead, abs=0.12 if case.humanline else 0.01)


def test_a_sample_of_the_gradients_has_the_right_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "WHOLE", 0)
    monkeypatch.setattr(reference, "SAMPLE_ROWS", 40)
    monkeypatch.setattr(reference, "SAMPLE_COLS", 60)
    monkeypatch.setattr(reference, "SLICE_BYTES", 8 * 256 * 300)  # several slices of the vocabulary
    case = replace(TINY, mode="dpo", live=0.5)
    inputs = make_inputs(case, "cpu")
    true, (_, dhidden, dweight) = reference.truth(case, inputs), dense(case, inputs)
    assert 40 <= true.rows.numel() <= 45 and 50 <= true.cols.numel() <= 60
    torch.testing.assert_close(true.dhidden, dhidden[true.rows])
    torch.testing.assert_close(true.dweight, dweight[true.cols])


@pytest.mark.filterwarnings("ignore")  # warnings of other libraries are theirs
@pytest.mark.parametrize(("case", "name"), served(), ids=lambda value: getattr(value, "label", value))
def test_provider_is_exact(case: Case, name: str) -> None:
    provider = ALL[name]
    reason = provider.why_not("cpu")
    if reason:
        pytest.skip(reason)
    inputs = make_inputs(case, "cpu")
    if provider.without_reference(case):
        inputs = without_reference(inputs)
    result = provider.build(case, inputs)()
    assert (result[1] is not None, result[2] is not None) == (case.grad_hidden, case.grad_weight)
    found = measure.errors(case, inputs, reference.truth(case, inputs), result)
    # sums of raw log-probs, without a reference near them, lose more digits in float32
    limit = 1e-4 if provider.without_reference(case) else measure.EXACT
    assert measure.beyond(found, dict.fromkeys(found, limit)) is None


@pytest.mark.parametrize("mode", MODES)
def test_cuda_is_exact(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_tests.use("cuda", monkeypatch, torch.device("cpu"))
    case = replace(TINY, mode=mode, logits="peaked")
    inputs, cuda = make_inputs(case, "cpu"), Ours("fused_align[cuda,auto]", ours=True, backend="cuda")
    assert cuda.why_not("cpu") is None
    found = measure.errors(case, inputs, reference.truth(case, inputs), cuda.build(case, inputs)())
    assert measure.beyond(found, dict.fromkeys(found, measure.EXACT)) is None


@pytest.mark.parametrize("mode", MODES)
def test_own_plans_in_bfloat16_are_no_worse_than_eager(mode: str) -> None:
    case = replace(TINY, mode=mode, dtype="bfloat16")
    # Triton's interpreter would take minutes for the rounds; tests/ has the kernels' bfloat16
    own: list[Provider] = [
        p for p in ALL.values() if isinstance(p, Ours) and p.backend not in backends.KERNELS
    ]
    rows = measure.run_case(case, own, QUICK, print)
    assert rows and not any(row["note"] for row in rows)


# ---- the gate -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wrong(Provider):
    """Off by `by`, or raising if that is 0."""

    by: float = 1e-3

    def build(self, case: Case, inputs: Inputs) -> Call:
        right = providers.EAGER.build(case, inputs)

        def run() -> providers.Result:
            if not self.by:
                raise ArithmeticError("this peer does not work")
            value, dhidden, dweight = right()
            assert dhidden is not None
            return value, dhidden * (1 + self.by), dweight

        return run


def run_one(provider: Provider, settings: measure.Settings = QUICK) -> measure.Row:
    (row,) = measure.run_case(TINY, [provider], settings, print)
    return row


@pytest.mark.parametrize("by", [1e-3, float("nan")])
def test_own_plan_beyond_the_gate_is_not_timed(by: float) -> None:
    row = run_one(Wrong("wrong", ours=True, by=by))
    assert "beyond the gate: dhidden" in str(row["failed"]) and "seconds" not in row


def test_own_failure_makes_the_exit_code_after_the_rest_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich", reason="the command line prints with rich; pip install '.[bench]'")
    from . import __main__ as command

    out = tmp_path / "rows.jsonl"
    asked = ["run", "--suite", "smoke", "--modes", "sft", "--no-memory", "--device", "cpu", "--out", str(out)]
    found = [Wrong("fused_align[wrong]", ours=True), Wrong("peer", by=0), providers.EAGER]
    monkeypatch.setattr(command, "providers", lambda device: found)
    assert command.main([*asked, "--providers", "*"]) == 1
    assert [(row["provider"], "failed" in row) for row in report.read(out)] == [
        ("fused_align[wrong]", True), ("peer", True), ("eager", False)
    ]  # fmt: skip
    assert "failed: fused_align[wrong]" in capsys.readouterr().out
    assert command.main([*asked, "--providers", "peer", "eager"]) == 0


def test_a_call_that_fails_later_is_a_row_with_the_reason() -> None:
    @dataclass(frozen=True)
    class Tiring(Provider):
        def build(self, case: Case, inputs: Inputs) -> Call:
            right, calls = providers.EAGER.build(case, inputs), []

            def run() -> providers.Result:
                calls.append(1)
                if len(calls) > 4:
                    raise MemoryError("no more")
                return right()

            return run

    rows = measure.run_case(TINY, [Tiring("tiring"), providers.EAGER], QUICK, print)
    assert rows[0]["failed"] == "MemoryError: no more" and rows[1]["rounds"] == 5


# ---- limited time ---------------------------------------------------------------------------------------


def test_late_rounds_are_dropped() -> None:
    def rounds(**times: float) -> int:
        settings = replace(QUICK, rounds=20, **times)
        return len(measure.in_turn({"nothing": lambda: None}, settings)["nothing"])

    assert (rounds(), rounds(share=0.0), rounds(deadline=0.0)) == (20, measure.MIN_ROUNDS, 2)


def test_a_peer_is_not_waited_for_beyond_the_deadline() -> None:
    @dataclass(frozen=True)
    class Sleepy(Provider):
        def build(self, case: Case, inputs: Inputs) -> Call:
            time.sleep(30)
            return providers.EAGER.build(case, inputs)

    row = run_one(Sleepy("sleepy"), replace(QUICK, deadline=time.monotonic() + 0.3))
    assert "cut short" in str(row["failed"])
    said: list[str] = []
    assert measure.run_case(TINY, [providers.EAGER], replace(QUICK, deadline=0.0), said.append) == []
    assert "the time is up" in said[0]


def test_cases_that_there_is_no_time_for_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich", reason="the command line prints with rich; pip install '.[bench]'")
    from .__main__ import main

    sizes = ["--rows", "256", "--hidden", "16", "--vocab", "512", "--workspace-mib", "64", "--no-memory"]
    asked = ["--providers", "fused_align[torch,*", "--modes", "score", "--out", str(tmp_path / "rows")]
    arguments = ["run", "--suite", "gpu", "--device", "cpu", *sizes, *asked]
    assert main([*arguments, "--minutes", "1e-9"]) == 0
    assert "not run, the time was up" in capsys.readouterr().out and not (tmp_path / "rows").exists()
    assert main([*arguments, "--minutes", "1", "--logits", "randn"]) == 0
    found = report.read(tmp_path / "rows")
    assert {row["provider"] for row in found} == {"fused_align[torch,score,64MiB]"}
    assert "not run" not in capsys.readouterr().out


# ---- kernels --------------------------------------------------------------------------------------------

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = kernel_works.Sizes(256, 32, 256, 64, 64, DEVICE)


@pytest.fixture(params=backends.KERNELS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend of kernels: on a GPU, or by Triton's interpreter and the emulation of tests/."""
    kernel_tests.use(request.param, monkeypatch, torch.device(DEVICE))
    return request.param


@pytest.fixture
def both(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in backends.KERNELS:
        kernel_tests.use(name, monkeypatch, torch.device(DEVICE))


@pytest.mark.parametrize("work", kernel_works.works(SMALL), ids=lambda work: work.name)
def test_kernels_agree_with_torch_and_know_their_bytes(work: kernel_works.Work, backend: str) -> None:
    gemm = torch_.gemm
    error, bad = kernels.compared(work, backends.steps(backend))
    assert bad is None and error < 4e-3 and torch_.gemm is gemm
    assert work.make(1).nbytes > 1000


def test_a_kernel_that_fails_or_is_beyond_the_gate_is_not_timed() -> None:
    def call(of: object) -> tuple[Tensor]:
        if of == "broken":
            raise RuntimeError("it can't be launched")
        return (torch.full((4,), 2.0 if of == "wrong" else 1.0),)

    copy = kernels.copies(DEVICE, 1024)
    work = kernel_works.Work("twice", lambda seed: kernel_works.Made(call, 16))
    using = {"cuda": "wrong", "torch": "right", "triton": "broken"}
    wrong, right, broken = kernels.measure(work, using, copy, 2048, SMALL, 5)
    assert "beyond the gate: output 0" in wrong["failed"] and "seconds" not in wrong
    assert broken["failed"] == "RuntimeError: it can't be launched" and "seconds" not in broken
    assert right["provider"] == "torch:twice" and right["seconds"] > 0 and "failed" not in right


def test_every_kernel_with_block_sizes_is_measured(both: None) -> None:
    from fused_align.backends.triton_ import tuning

    measured = {work.launch for work in kernel_works.works(SMALL)}
    assert {name for name, launch in tuning.launches() if launch.others} <= measured


def test_the_command_line_of_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str], both: None) -> None:
    pytest.importorskip("rich", reason="the command line prints with rich; pip install '.[bench]'")
    from fused_align.backends.triton_ import tuning

    from .__main__ import main

    out, before = str(tmp_path / "kernels.jsonl"), tuning.scaled_rows
    asked = ["--rows", "256", "--hidden", "32", "--vocab", "128", "--rounds", "5", "--out", out]
    asked += ["--device", DEVICE, "--providers", "scaled_rows", "cuda:finish*"]
    assert main(["run", "--suite", "kernels", *asked, "--candidates"]) == 0
    said = capsys.readouterr().out
    assert "default" in said and "best" in said and tuning.scaled_rows is before
    assert "cuda takes" in said and "of triton's time, the geometric mean of 1" in said
    assert [row["provider"] for row in report.read(out)] == [
        "triton:scaled_rows", "cuda:scaled_rows", "cuda:finish_rows"
    ]  # fmt: skip
    assert main(["compare", out, out, "--fail-above", "5"]) == 0
    assert main(["table", out]) == 0
    assert "| scaled_rows | cuda |" in capsys.readouterr().out


def test_the_suite_of_kernels_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("rich", reason="the command line prints with rich; pip install '.[bench]'")
    from .__main__ import main

    monkeypatch.setattr(
        kernels, "reasons", lambda device: {"triton": "it is not installed", "cuda": "no nvcc"}
    )
    assert main(["run", "--suite", "kernels", "--device", "cpu", "--out", str(tmp_path / "rows")]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "needs a backend of kernels, and there is none: triton: it is not installed; cuda: no nvcc." in said
    )


def kernel_row(provider: str, seconds: float, **changes: object) -> report.Row:
    row = row_of(provider, report.KERNEL, seconds=seconds, seconds_p20=9e-5, seconds_p80=1.1e-4, ratio=1.25)
    del row["ratio_live"]
    return row | {"host_seconds": 2e-5, "moved_bytes": 400_000_000, "error_value": 1e-7, **changes}


def test_a_kernels_row_in_a_table() -> None:
    row = kernel_row("cuda:exp_tile[sums]", 1e-4)
    rows = [
        row,
        {**row, "provider": "triton:slow", "bound": 1.2},
        {**row, "provider": "cuda:bad", "failed": "it is off"},
    ]
    lines = report.markdown(rows).splitlines()
    assert lines[4:7] == [
        "| exp_tile[sums] | cuda | 100.0 | 90.0-110.0 | 20.0 | 381 | 4000 | 0.80 | 1.0e-07 |  |",
        "| slow | triton | 100.0 | 90.0-110.0 | 20.0 | 381 | 4000 | 0.80 | 1.0e-07 | does NOT hold |",
        "| bad | cuda |  |  |  |  |  |  |  | failed: it is off |",
    ]


def test_what_kernels_are_to_reach_is_counted() -> None:
    bound = 1 / kernels.BOUND
    found = kernels.summary([
        kernel_row("triton:a", 1e-4, bound=bound),
        kernel_row("cuda:a", 2e-4, bound=bound, ratio=1.1),
        kernel_row("triton:loss", 4e-5, most_seconds=2e-5),
        kernel_row("cuda:loss", 1e-5, most_seconds=2e-5),
        kernel_row("cuda:small", 1e-6),
        {**kernel_row("cuda:bad", 1e-6), "failed": "it is off"},
    ])  # fmt: skip
    assert found == [
        "does NOT hold: triton:a reaches 0.80 of a copy's bandwidth, less than 0.85",
        "does NOT hold: triton:loss takes 40.0 µs, not less than 20",
        "triton: 0 of 1 kernels reach 85% of a copy's bandwidth",
        "triton: 0 of 1 losses take less than 20 µs",
        "cuda: 1 of 1 kernels reach 85% of a copy's bandwidth",
        "cuda: 1 of 1 losses take less than 20 µs",
        "cuda takes 0.707 of triton's time, the geometric mean of 2; longer in 1: a (2.00)",
    ]


def test_tiles_of_a_given_size_are_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    from fused_align.linear import ops

    taken, choose = [], ops.choose
    monkeypatch.setattr(ops, "choose", lambda *given: taken.append(choose(*given)) or taken[-1])
    own, case = ALL["fused_align[torch,score]"], replace(TINY, mode="score")
    assert isinstance(own, Ours)
    for provider in (own, own.with_tile((64, 1)), own):
        provider.build(case, make_inputs(case, "cpu"))()
    assert [plan.rows for plan in taken] == [256, 64, 256]


def test_the_suite_of_a_gpu_in_parts_by_head() -> None:
    for name in ("gpu", "tune"):
        shapes = {part.cases[0].shape for part in SUITES[name].parts}
        assert shapes == {"Llama-3-8B", "Gemma-2B", "Qwen2.5-7B"}
        for shape in shapes:
            assert {part.cases[0].shape for part in SUITES[name].of_shape(shape).parts} == {shape}


def test_a_peer_beyond_the_gate_is_timed_and_the_row_says_so() -> None:
    row = run_one(Wrong("wrong"))
    assert "beyond the gate: dhidden" in str(row["note"]) and row["seconds"]


def test_a_peer_that_fails_is_a_row_with_the_reason() -> None:
    row = run_one(Wrong("wrong", by=0))
    assert row["failed"] == "ArithmeticError: this peer does not work" and "seconds" not in row
    assert "this peer does not work" in report.markdown([row])


def test_a_peer_that_takes_too_long_is_not_timed() -> None:
    row = run_one(providers.EAGER, replace(QUICK, max_seconds=0.0))
    assert "more than the 0 s" in str(row["failed"]) and "seconds" not in row


def test_a_plan_that_the_budget_is_too_small_for_is_left_out_with_its_reason() -> None:
    case = replace(TINY, mode="dpo", rows=1024, vocab=32768)
    said: list[str] = []
    window = ALL["fused_align[torch,window]"]
    assert isinstance(window, Ours)
    assert measure.run_case(case, [window.with_workspace(1)], QUICK, said.append) == []
    assert len(said) == 1 and "cannot serve" in said[0]


# ---- cases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUITES)
def test_suites_have_each_case_once(name: str) -> None:
    suite = SUITES[name]
    cases = [(case, part.providers) for part in suite.parts or (suite,) for case in part.cases]
    assert (cases or name == "kernels") and len(set(cases)) == len(cases)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": 100}, "multiple of 256"),
        ({"mode": "ppo"}, "mode must be one of"),
        ({"dead": 0.5}, "no coefficient of sft can be zero"),
        ({"live": 0.0}, "live must be in"),
    ],
)
def test_a_case_that_cannot_be_says_so(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **wrong)


def test_inputs_are_the_same_in_every_process() -> None:
    inputs = make_inputs(TINY, "cpu")
    assert inputs.hidden[0, 0].item() == pytest.approx(0.26515728)
    assert inputs.target[:3].tolist() == [316, 372, 139]


# ---- reports --------------------------------------------------------------------------------------------


def row_of(provider: str = "eager", mode: str = "sft", **changes: object) -> report.Row:
    row: report.Row = {
        **TINY.fields(), "mode": mode, "provider": provider, "passes": 3, "package": "torch",
        "version": "2.13.0", "torch": "2.13.0", "device": "a CPU", "threads": 2, "commit": "abc1234",
        "rounds": 5, "seconds": 0.25, "seconds_p20": 0.2, "seconds_p80": 0.3, "ratio": 1.5, "ratio_live": 1.5,
        "peak_bytes": 3 << 20, "peak_extra_bytes": 2 << 20, "error_value": 1e-8, "error_dhidden": 3e-7,
        "note": "",
    }  # fmt: skip
    return {**row, **changes}


def test_the_table_of_some_rows() -> None:
    rows = [row_of("trl", seconds=0.5), row_of(seconds=9.0), row_of(), row_of(mode="dpo", note="a | b")]
    text = report.markdown(rows)
    assert text == report.markdown(rows)
    assert text.splitlines() == [
        "**tiny: 256 x 16 x 512, float32, randn**",
        "",
        "| mode | provider | G | seconds | p20-p80 | ratio | extra MiB | value | gradients | note |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        "| sft | trl | 3 | 0.5 | 0.2-0.3 | 1.50 | 2 | 1.0e-08 | 3.0e-07 |  |",
        "| sft | eager | 3 | 0.25 | 0.2-0.3 | 1.50 | 2 | 1.0e-08 | 3.0e-07 |  |",
        "| dpo | eager | 3 | 0.25 | 0.2-0.3 | 1.50 | 2 | 1.0e-08 | 3.0e-07 | a \\| b |",
        "",
        "a CPU, 2 threads, torch 2.13.0, commit abc1234, medians of 5 rounds.",
    ]


def test_a_table_goes_between_its_markers(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("a\n<!-- bench:core -->\nold\n<!-- /bench:core -->\nb\n")
    for _ in range(2):
        report.write_between(path, "core", "new")
        assert path.read_text() == "a\n<!-- bench:core -->\nnew\n<!-- /bench:core -->\nb\n"
    with pytest.raises(ValueError, match="must have the line"):
        report.write_between(path, "peers", "new")


def test_compare_takes_the_median_of_the_ratios() -> None:
    before = [row_of(ratio=ratio) for ratio in (1.0, 2.0, 9.0)] + [row_of("gone")]
    (change,) = report.compare(before, [row_of(ratio=2.2, peak_bytes=6 << 20, error_dhidden=1e-6)])
    assert change["ratio_change"] == pytest.approx(10)
    assert change["memory_change"] == pytest.approx(100)
    assert (change["error_before"], change["error_after"]) == (3e-7, 1e-6)
    assert report.worse([change], 99) == [change] and report.worse([change], 101) == []


def test_the_command_line_from_run_to_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich", reason="the command line prints with rich; pip install '.[bench]'")
    from .__main__ import main

    rows = str(tmp_path / "rows.jsonl")
    asked = ["--modes", "dpo*", "--providers", "fused_align[auto,auto]", "eager", "--device", "cpu"]
    assert (
        main(["run", "--suite", "smoke", *asked, "--no-memory", "--workspace-mib", "16", "--out", rows]) == 0
    )
    found = report.read(rows)
    assert [(row["mode"], row["provider"]) for row in found] == [
        ("dpo", "fused_align[auto,auto,16MiB]"), ("dpo", "eager"),
        ("dpo-frozen", "fused_align[auto,auto,16MiB]"), ("dpo-frozen", "eager"),
    ]  # fmt: skip
    assert json.loads(Path(rows).read_text().splitlines()[0])["workspace_mib"] == 16
    assert main(["compare", rows, rows, "--fail-above", "5"]) == 0
    capsys.readouterr()
    assert main(["table", rows, "--modes", "dpo"]) == 0
    assert "| dpo | eager | 3 |" in capsys.readouterr().out
    assert main(["run", "--rounds", "2"]) == 1
    assert "--rounds must be at least 5" in capsys.readouterr().err


def test_the_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="plots need matplotlib; pip install '.[bench]'")
    path = tmp_path / "rows.png"
    report.plot([row_of(), row_of("trl"), row_of(mode="dpo", peak_extra_bytes=-5)], path)
    assert path.stat().st_size > 10_000
    with pytest.raises(ValueError, match="nothing to plot"):
        report.plot([row_of(peak_extra_bytes=None)], path)


def test_a_provider_is_found_by_its_full_name() -> None:
    from .__main__ import find

    own = ALL["fused_align[torch,score]"]
    assert isinstance(own, Ours)
    for one in (
        own,
        own.with_workspace(64),
        own.with_tile((64, 1)),
        own.with_workspace(64).with_tile((64, 1)),
    ):
        assert find(one.name, "cpu") == one
    for name in ("eager", "liger[compiled=False]", "fused_align[auto,auto,bf16]"):
        assert find(name, "cpu") == ALL[name]
    for name in ("other", "eager,64MiB", "liger[compiled=False,64MiB]"):
        with pytest.raises(ValueError, match="no provider"):
            find(name, "cpu")


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="peaks on a CPU are read from Linux's /proc"
)
def test_the_peak_of_full_logits_is_seen() -> None:
    pytest.importorskip("rich", reason="the command line prints with rich; pip install '.[bench]'")
    case = replace(TINY, rows=1024, vocab=32768, mode="score")
    peak = measure.peak_bytes(case, providers.EAGER, lambda: (torch.empty(0), None, None), "cpu")
    logits = 4 * case.rows * case.vocab
    assert peak is not None and 1.9 * logits < peak < 2.5 * logits  # logits and their log-softmax
    own = Ours("fused_align[auto,auto,16MiB]", "fused-align", ours=True, workspace_mib=16)
    peak = measure.peak_bytes(case, own, lambda: (torch.empty(0), None, None), "cpu")
    assert peak is not None and peak < 40 << 20
