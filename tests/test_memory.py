"""Nothing of size [N, V] exists and the peak stays within workspace_bytes plus outputs: counted and measured.

The profiler reports every allocation of torch's CPU allocator, also inside kernels and custom ops, which a
TorchDispatchMode cannot see into. What a process takes from the system is measured in one of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from cases import HUMANLINE, SELECTED, generator, loss_id, plans_for, randn
from tolerances import relative_errors
from torch.profiler import ProfilerActivity, profile

import fused_align as fa
import oracles

MIB = 1 << 20
S, T, H, V = 16, 64, 128, 16384
N = S * T
LOGITS = 4 * N * V  # 64 MiB
#: room for vectors of one number per token, such as log-probs, anchors, masks, sums and their gradients
PER_TOKEN = 40 * 8


@dataclass
class Allocations:
    largest: int  # bytes of the largest single allocation
    peak: int  # most bytes alive at once, of those allocated meanwhile


def allocations(function: Callable[[], object], trace: Path) -> Allocations:
    fa.release_workspace()  # else it would not be allocated meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        function()
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    alive: dict[int, int] = {}
    found = Allocations(0, 0)
    for event in sorted(events, key=lambda e: e["args"]["Ev Idx"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            alive[address] = size
            found.largest = max(found.largest, size)
            found.peak = max(found.peak, sum(alive.values()))
        else:
            alive.pop(address, None)
    return found


def test_the_recorder_sees_what_there_is(tmp_path: Path):
    hidden, weight = randn(N, H, seed=1).float().requires_grad_(), randn(V, H, seed=2).float()
    target = torch.randint(V, (N,), generator=generator(3))

    def dense() -> None:
        logp = torch.log_softmax(hidden @ weight.T, -1).gather(1, target[:, None])
        logp.sum().backward()

    found = allocations(dense, tmp_path / "trace.json")
    assert found.largest == LOGITS
    assert found.peak >= 2 * LOGITS


@dataclass
class Problem:
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    batch: fa.Batch

    @property
    def inputs(self) -> list[int]:
        return [t.nbytes for t in (self.hidden, self.weight, self.bias) if t is not None]

    @property
    def outputs(self) -> int:
        """Bytes of the gradients that the operands get."""
        leaves = [t for t in (self.hidden, self.weight, self.bias) if t is not None]
        return sum(t.nbytes for t in leaves if t.requires_grad)

    def backward(self, value: torch.Tensor) -> None:
        if value.requires_grad:
            value.sum().backward()


def make_problem(
    dtype: torch.dtype = torch.float32, *, frozen: bool, masked: bool, bias: bool = False
) -> Problem:
    hidden = randn(S, T, H, seed=1, dtype=dtype).requires_grad_()
    weight = (randn(V, H, seed=2) / H**0.5).to(dtype).requires_grad_(not frozen)
    offset = randn(V, seed=3, dtype=dtype).requires_grad_(not frozen) if bias else None
    target = torch.randint(V, (S, T), generator=generator(4))
    if masked:
        target[:, ::3] = oracles.IGNORE
    near = torch.full((S, T), -9.7) + 0.3 * randn(S, T, seed=5).float()
    batch = fa.Batch(
        target,
        old_logp=near,
        ref_logp=near + 0.1,
        advantage=randn(S, seed=6).float(),
        desirable=torch.arange(S) % 2 == 0,
        kl=torch.tensor(0.1),
        margin=randn(S // 2, seed=7).float(),
        sampler_logp=near - 0.05,
        off_policy=torch.arange(S) % 3 == 0,
        reference=torch.arange(S) % 4 == 0,
        group=torch.arange(S) // 4,
    )
    return Problem(hidden, weight, offset, batch)


def check(problem: Problem, run: Callable[[], object], budget: int, trace: Path) -> None:
    assert budget < 4 * problem.batch.count("tokens") * V
    found = allocations(run, trace)
    assert found.largest <= max(budget, problem.outputs, *problem.inputs)
    assert found.peak <= budget + problem.outputs + PER_TOKEN * N, (
        f"{found.peak - problem.outputs} above outputs"
    )


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("head", [{}, {"softcap": 20.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("plan", ["score", "jacobian", "recompute"])
@pytest.mark.parametrize("budget", [4 * MIB, 8 * MIB, 32 * MIB])
def test_linear_logp(plan: str, budget: int, head: dict, masked: bool, tmp_path: Path):
    problem = make_problem(frozen=plan == "jacobian", masked=masked, bias=plan == "recompute")
    if plan == "score":
        problem.hidden.requires_grad_(False)
        problem.weight.requires_grad_(False)

    def run() -> None:
        problem.backward(
            fa.linear_logp(
                problem.hidden, problem.weight, problem.batch.target, bias=problem.bias, plan=plan,
                workspace_bytes=budget, **head,
            )
        )  # fmt: skip

    check(problem, run, budget, tmp_path / "trace.json")


@pytest.mark.parametrize("grad", [False, True])
def test_token_stats(grad: bool, tmp_path: Path):
    problem = make_problem(frozen=False, masked=False)
    if not grad:
        problem.hidden.requires_grad_(False)
        problem.weight.requires_grad_(False)

    def run() -> None:
        stats = fa.token_stats(
            problem.hidden,
            problem.weight,
            problem.batch.target,
            entropy=True,
            lse=True,
            workspace_bytes=8 * MIB,
        )
        assert stats.entropy is not None and stats.lse is not None
        problem.backward(stats.logp + stats.entropy + stats.lse)

    check(problem, run, 8 * MIB, tmp_path / "trace.json")


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize(
    ("loss", "plan", "frozen"),
    [
        pytest.param(loss, plan, frozen, id=f"{loss_id(loss)}-{plan}{'-frozen' if frozen else ''}")
        for loss in (fa.SFT(), fa.DPO(), fa.KTO(), fa.GRPO(beta=0.1))
        for frozen in (False, True)
        for plan in plans_for(loss, frozen_head=frozen)
    ],
)
def test_align_loss(loss: fa.Loss, plan: str, frozen: bool, masked: bool, tmp_path: Path):
    problem = make_problem(frozen=frozen, masked=masked)
    budget = 32 * MIB

    def run() -> None:
        humanline = HUMANLINE if loss.anchor else None
        out = fa.align_loss(
            problem.hidden,
            problem.weight,
            problem.batch,
            loss,
            plan=plan,
            workspace_bytes=budget,
            humanline=humanline,
        )
        problem.backward(out.loss)

    check(problem, run, budget, tmp_path / "trace.json")


@pytest.mark.parametrize("loss", SELECTED, ids=loss_id)
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_auto_keeps_to_a_small_budget(loss: fa.Loss, frozen: bool, tmp_path: Path):
    problem = make_problem(frozen=frozen, masked=False)

    def run() -> None:
        out = fa.align_loss(problem.hidden, problem.weight, problem.batch, loss, workspace_bytes=4 * MIB)
        problem.backward(out.loss)

    check(problem, run, 4 * MIB, tmp_path / "trace.json")


@pytest.mark.parametrize("plan", ["jacobian", "recompute", "window"])
def test_half_operands(plan: str, tmp_path: Path):
    """The float32 sum of a 16-bit dweight counts as workspace."""
    problem = make_problem(torch.bfloat16, frozen=plan == "jacobian", masked=False)

    def run() -> None:
        out = fa.align_loss(
            problem.hidden, problem.weight, problem.batch, fa.DPO(), plan=plan, workspace_bytes=32 * MIB
        )
        problem.backward(out.loss)

    check(problem, run, 32 * MIB, tmp_path / "trace.json")


def test_half_operands_with_many_rows(tmp_path: Path):
    """However many rows there are, a 16-bit dweight needs no tile of all of them."""
    rows, size, words, budget = 8192, 32, 2048, 3 * MIB
    hidden = randn(rows, size, seed=1, dtype=torch.bfloat16).requires_grad_()
    weight = randn(words, size, seed=2, dtype=torch.bfloat16).requires_grad_()
    target = torch.randint(words, (rows,), generator=generator(3))

    def run() -> None:
        fa.linear_logp(hidden, weight, target, workspace_bytes=budget).sum().backward()

    found = allocations(run, tmp_path / "trace.json")
    assert found.largest <= budget
    assert found.peak <= budget + hidden.nbytes + weight.nbytes + PER_TOKEN * rows


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("mode", ["rounded", "mixed", "autocast"])
@pytest.mark.parametrize("budget", [4 * MIB, 8 * MIB, 32 * MIB])
def test_rounded_operands(budget: int, mode: str, frozen: bool, tmp_path: Path):
    """What a GEMM of 16-bit operands rounds, casts and gives before it is added counts as workspace."""
    problem = make_problem(
        torch.bfloat16 if mode == "rounded" else torch.float32, frozen=frozen, masked=False
    )
    if mode == "mixed":
        problem.hidden = problem.hidden.detach().bfloat16().requires_grad_()

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            out = fa.align_loss(
                problem.hidden, problem.weight, problem.batch, fa.DPO(), workspace_bytes=budget,
                precision="high" if mode == "autocast" else "bf16",
            )  # fmt: skip
        problem.backward(out.loss)

    check(problem, run, budget, tmp_path / "trace.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("budget", [8 * MIB, 32 * MIB])
@pytest.mark.parametrize("loss", [fa.GRPO(entropy_coef=0.1), fa.SFT(label_smoothing=0.1)], ids=loss_id)
def test_losses_of_more_than_log_probs(loss: fa.Loss, budget: int, dtype: torch.dtype, tmp_path: Path):
    problem = make_problem(dtype, frozen=False, masked=False)

    def run() -> None:
        out = fa.align_loss(problem.hidden, problem.weight, problem.batch, loss, workspace_bytes=budget)
        problem.backward(out.loss)

    check(problem, run, budget, tmp_path / "trace.json")


def test_the_float32_gradient_of_a_float16_head_counts(tmp_path: Path):
    """It waits in float32 for the upstream gradient even where one chunk is all there is."""
    hidden = randn(64, 512, seed=1, dtype=torch.float16).requires_grad_()
    weight = randn(4096, 512, seed=2, dtype=torch.float16).requires_grad_()
    batch, budget = fa.Batch(torch.randint(4096, (1, 64), generator=generator(3))), 8 * MIB

    def run() -> None:
        fa.align_loss(hidden[None], weight, batch, fa.SFT(), workspace_bytes=budget).loss.backward()

    found = allocations(run, tmp_path / "trace.json")
    assert found.peak <= budget + hidden.nbytes + weight.nbytes + PER_TOKEN * 64


@pytest.mark.parametrize("budget", [8 * MIB, 32 * MIB])
@pytest.mark.parametrize("loss", [fa.SFT(), fa.DPO()], ids=loss_id)
def test_float16(loss: fa.Loss, budget: int, tmp_path: Path):
    problem = make_problem(torch.float16, frozen=False, masked=True)

    def run() -> None:
        out = fa.align_loss(problem.hidden, problem.weight, problem.batch, loss, workspace_bytes=budget)
        problem.backward(out.loss)

    check(problem, run, budget, tmp_path / "trace.json")


def test_a_frozen_head_holds_one_product_of_hidden(tmp_path: Path):
    """`jacobian` hands its backward one float32 tensor of hidden's shape, larger here than the budget."""
    rows, size, words, budget = 8192, 256, 4096, 4 * MIB
    hidden = randn(rows, size, seed=1, dtype=torch.float32).requires_grad_()
    weight = randn(words, size, seed=2, dtype=torch.float32)
    target = torch.randint(words, (rows,), generator=generator(3))
    target[::2] = oracles.IGNORE

    def run() -> None:
        fa.linear_logp(hidden, weight, target, workspace_bytes=budget).sum().backward()

    found = allocations(run, tmp_path / "trace.json")
    assert found.peak <= budget + 2 * hidden.nbytes + PER_TOKEN * rows


def test_half_operands_with_more_rows_than_fit(tmp_path: Path):
    """Where float32 dhidden of all rows is beyond the budget, it is formed in a walk of its own."""
    rows, size, words, budget = 8192, 256, 4096, 6 * MIB
    hidden = randn(rows, size, seed=1, dtype=torch.bfloat16).requires_grad_()
    weight = (randn(words, size, seed=2) / size**0.5).bfloat16().requires_grad_()
    target = torch.randint(words, (rows,), generator=generator(3))
    target[::3] = oracles.IGNORE

    def run() -> None:
        fa.linear_logp(hidden, weight, target, workspace_bytes=budget).sum().backward()

    found = allocations(run, tmp_path / "trace.json")
    assert found.largest <= budget
    assert found.peak <= budget + hidden.nbytes + weight.nbytes + PER_TOKEN * rows
    few = [hidden.grad, weight.grad]
    hidden.grad = weight.grad = None
    fa.linear_logp(hidden, weight, target, workspace_bytes=64 * MIB).sum().backward()
    for got, want in zip(few, (hidden.grad, weight.grad), strict=True):
        assert got is not None and want is not None
        assert relative_errors(got, want.double())[0] < 2**-8  # products are rounded to 16 bits


def test_a_view_of_hidden_is_copied_once(tmp_path: Path):
    hidden, weight = randn(S, T + 1, 2048, seed=1).float(), randn(300, 2048, seed=2).float()
    target = torch.randint(300, (S, T), generator=generator(3))
    batch = fa.Batch(target, ref_logp=torch.zeros(S, T))

    def run() -> None:
        fa.align_loss(hidden[:, :-1], weight, batch, fa.DPO(), workspace_bytes=4 * MIB)

    found = allocations(run, tmp_path / "trace.json")
    assert found.peak <= 4 * MIB + 4 * N * 2048 + PER_TOKEN * N


def test_logp_from_logits_makes_no_copy_to_score(tmp_path: Path):
    logits = randn(2048, V, seed=1, dtype=torch.float32)
    target = torch.randint(V, (2048,), generator=generator(2))
    found = allocations(lambda: fa.logp_from_logits(logits, target), tmp_path / "trace.json")
    assert found.peak < logits.nbytes / 4


MEASURE = """
import sys
from pathlib import Path
import torch
import fused_align as fa

budget, frozen = int(sys.argv[1]), sys.argv[2] == "frozen"
S, T, H, V = 16, 64, 128, 16384
torch.set_num_threads(1)
hidden = torch.randn(S, T, H, requires_grad=True)
weight = torch.randn(V, H).div_(H**0.5).requires_grad_(not frozen)
target = torch.randint(V, (S, T))
ref = torch.full((S, T), -9.7)

def run(rows, words, plan="auto"):
    batch = fa.Batch(target[:, :rows], ref_logp=ref[:, :rows])
    out = fa.align_loss(hidden[:, :rows], weight[:words], batch, fa.DPO(), plan=plan, workspace_bytes=budget)
    out.loss.backward()

def resident(field):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024

target.clamp_(max=299)
for plan in ("auto", "recompute"):
    run(4, 300, plan)  # libraries load and set up what they keep
with torch.no_grad():  # so does the GEMM library, once per kind of product
    x, w = hidden.reshape(-1, H), weight[:2048]
    logits = x @ w.T
    logits @ w, logits.T @ x
    del logits, x, w
hidden.grad = weight.grad = None
fa.release_workspace()
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = resident("VmRSS")
run(T, V)
print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process' peak from /proc")
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("budget", [8 * MIB, 32 * MIB])
def test_what_the_process_takes(budget: int, frozen: bool):
    command = [sys.executable, "-c", MEASURE, str(budget), "frozen" if frozen else "trainable"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    outputs = 4 * N * H + (0 if frozen else 4 * V * H)
    libraries = 4 * MIB  # packing buffers of the GEMM library, the allocator's rounding
    assert int(done.stdout) <= budget + outputs + PER_TOKEN * N + libraries
