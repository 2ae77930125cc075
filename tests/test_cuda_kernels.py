"""What only the cuda backend has: rows and sequences longer than a block, strips of a row, checks at launch.

What it has in common with triton: test_kernel_backends.py, test_loss_kernels.py, test_logits_kernel.py.
"""

from __future__ import annotations

import enum
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated
import kernels
import pytest
import sanitize
import test_loss_kernels as losses
import torch
from cases import Case, gradients, leaves_of, loss_id, make_case, make_head, oracle_loss, run_loss
from kernels import DEVICE
from test_logits_kernel import DTYPES, case, check, heat, same, truth
from tolerances import check_grad, check_like_torch, check_logp, check_loss
from torch import Tensor

import fused_align as fa
import oracles
from fused_align import backends
from fused_align.backends import codes, cuda_
from fused_align.backends.cuda_ import launches
from fused_align.backends.cuda_ import logits as logit_kernels

CPU = torch.device("cpu")
emulation = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.use("cuda", monkeypatch, DEVICE)


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The emulated one, wherever the tests run."""
    monkeypatch.setattr(cuda_, "module", kernels.emulated_module())
    monkeypatch.setenv("FUSED_ALIGN_BACKEND", "cuda")
    return cuda_.module


# --- losses of sequences longer than a block has threads ---


@cache
def long_problem(tokens: int = 5000) -> losses.Problem:
    """4 sequences, one of them much shorter; a third of the tokens is ignored."""
    made = torch.Generator().manual_seed(0)
    rand = partial(torch.rand, generator=made, dtype=torch.float64)
    randn = partial(torch.randn, generator=made, dtype=torch.float64)
    target = torch.where(rand(4, tokens) < 0.3, oracles.IGNORE, 1)
    target[1, 700:] = oracles.IGNORE
    logp = -randn(4, tokens).abs()
    columns = {
        "old_logp": logp + 0.2 * randn(4, tokens),
        "ref_logp": logp + 0.1 * randn(4, tokens),
        "sampler_logp": logp + 0.01 * randn(4, tokens),
        "advantage": randn(4, tokens),
        "token_weight": randn(4, tokens).abs(),
        "margin": randn(2),
        "desirable": torch.tensor([True, False, True, False]),
        "kl": torch.tensor(0.1, dtype=torch.float64),
    }
    return losses.Problem(logp, target, columns).poisoned(math.nan)


#: columns of types of their own: a kernel reads each token by itself then, and four of float32
MIXED = {
    "old_logp": torch.bfloat16, "ref_logp": torch.float16, "sampler_logp": torch.float64,
    "advantage": torch.bfloat16, "token_weight": torch.float64, "margin": torch.bfloat16, "kl": torch.float64,
}  # fmt: skip


def typed(problem: losses.Problem, types: str) -> losses.Problem:
    if types != "mixed":
        return problem.to(getattr(torch, types))
    found = problem.to(torch.float32)
    found.columns.update({name: found.columns[name].to(dtype) for name, dtype in MIXED.items()})
    return found


WAYS = [("float32", "padded"), ("mixed", "live")]
#: a loss of each way that a kernel walks a sequence, in float64 and the other way round, too
WALKS = [fa.GRPO(beta=0.1), fa.GSPO(beta=0.1), fa.DPO(), fa.KTO()]
LONG = [(loss, *way) for loss in losses.CLASSES for way in WAYS]
LONG += [(loss, *way) for loss in WALKS for way in (("float64", "padded"), ("float32", "live"))]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize(("loss", "types", "layout"), LONG, ids=lambda x: x if type(x) is str else loss_id(x))
def test_long_sequences(loss: fa.Loss, types: str, layout: str):
    problem, humanline = typed(long_problem(), types), losses.clip_of(loss)
    exact, dtype = problem.to(torch.float64), problem.logp.dtype
    want = losses.wanted(loss, exact.batch(), exact.logp, humanline, 777.0)
    batch, logp = problem.batch(), problem.logp
    if layout == "live":
        batch = batch.live()
        logp = logp.reshape(-1)[batch.rows]
    found, metrics = losses.run_on("cuda", loss, batch, logp, 777.0, humanline)
    check_loss(found.loss, want.loss, dtype)
    assert found.c is not None
    if layout == "padded":
        assert found.c[~problem.mask].eq(0).all()
    check_grad(found.c if layout == "live" else found.c[problem.mask], want.c, dtype, "c")
    assert metrics.keys() == want.metrics.keys()
    for name, metric in want.metrics.items():
        check_loss(metrics[name], metric.double(), dtype)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("loss", [fa.GRPO(beta=0.1), fa.REINFORCE(aggregation="token_mean")], ids=loss_id)
def test_several_blocks_share_a_sequence(loss: fa.Loss, monkeypatch: pytest.MonkeyPatch):
    problem = long_problem()
    (whole, metrics), (parts, same) = (
        (monkeypatch.setattr(launches, "_pieces", lambda one, device, count=count: count))
        or losses.run_on("cuda", loss, problem.batch(), problem.logp, 777.0)
        for count in (1, 7)
    )
    losses.check(parts, whole.loss, whole.c[problem.mask], problem.mask)  # type: ignore[index]
    losses.check_metrics(same, metrics)


@pytest.mark.usefixtures("cuda")
def test_more_sequences_than_threads():
    """The last block adds up what all have found, in more than one round."""
    S = 1100
    ref_logp, logp = torch.randn(2, S, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = fa.Batch(
        torch.ones(S, 1, dtype=torch.int64), ref_logp=ref_logp, desirable=torch.arange(S) % 3 == 0,
        kl=torch.tensor(0.1),
    )  # fmt: skip
    for loss in (fa.KTO(), fa.DPO()):
        want = losses.wanted(loss, batch, logp, None)
        found, metrics = losses.run_on("cuda", loss, batch, logp, want.objective.parts[0].count)
        losses.check(found, want.loss, want.c, torch.ones(S, 1, dtype=torch.bool))
        losses.check_metrics(metrics, want.metrics)


# --- logits that exist: rows anywhere, and long ones ---


def logit_gradient(z: Tensor, y: Tensor, stats: Any, inverse: Tensor | None, out: Tensor) -> Tensor:
    """Of logp - lse / 2 + entropy / 4, at a temperature of 1 / 1.3 where none is given."""
    one = torch.ones_like(stats.logp)
    logit_kernels.logit_gradient(one, -0.5 * one, 0.25 * one, z, y, stats, inverse, 1.3, out=out)
    return out


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "vocab, shift, apart", [(2047, 0, 1), (2047, 1, 0), (2047, 3, 8), (2047, 7, 3), (1, 5, 3)]
)
def test_rows_at_any_address(vocab: int, shift: int, apart: int, dtype: torch.dtype):
    """The same bits as of rows that begin at multiples of 16 bytes; what lies beside them stays."""
    z, y = case(5, vocab, dtype)
    storage = torch.full((shift + 5 * (vocab + apart) + 16,), torch.nan, dtype=dtype, device=DEVICE)
    view = storage.as_strided((5, vocab), (vocab + apart, 1), shift)
    view.copy_(z)
    aligned = torch.zeros(5, -(-vocab // 8) * 8, dtype=dtype, device=DEVICE)[:, :vocab]
    aligned.copy_(z)
    found, want = (logit_kernels.logit_stats(x, y, None, 1.3, entropy=True) for x in (view, aligned))
    assert same(found, want)
    check(found, truth(z, y, 1.3), dtype)
    grad = logit_gradient(aligned, y, found, None, torch.empty_like(aligned))
    for start in (0, 1, 2, 5):  # the gradient's rows begin elsewhere than those of the logits
        out = torch.full((start + 5 * (vocab + 3),), 7.0, dtype=dtype, device=DEVICE)
        to = out.as_strided((5, vocab), (vocab + 3, 1), start)
        assert torch.equal(logit_gradient(view, y, found, None, to), grad)
        to.fill_(7.0)
        assert out.eq(7.0).all()
    logit_gradient(view, y, found, None, view)
    assert torch.equal(view, grad)
    view.fill_(torch.nan)
    assert storage.isnan().all(), "beside the rows"


#: columns of a block: of whole rows, and with some or all columns in the last of several blocks
LARGE = [(4099, 32768), (32769, 32768), (50257, 32768), (50257, 9000), (20000, 3000)]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab, columns", LARGE)
def test_long_rows(vocab: int, columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logit_kernels, "COLUMNS", columns)
    z, y = case(5, vocab, dtype)
    z[0] *= 8  # peaked
    z[1] += 9 if dtype == torch.float16 else 90
    y[0], y[1], y[4] = vocab - 1, 0, vocab // 2
    exact, inverse = z.double().requires_grad_(), 1 / heat(5, dtype)
    want = truth(exact, y, inverse)
    (want[0] - 0.5 * want[1] + 0.25 * want[2]).sum().backward()
    found = logit_kernels.logit_stats(z, y, inverse, 1.0, entropy=True)
    check(found, want, dtype)
    for row in (0, 4):  # by itself it has the same bits
        only = slice(row, row + 1)
        alone = logit_kernels.logit_stats(z[only].clone(), y[only], inverse[only], 1.0, entropy=True)
        assert same(found, alone, only)
    out = logit_gradient(z, y, found, inverse, torch.full_like(z, torch.nan))
    assert exact.grad is not None
    if dtype in (torch.float64, torch.float32):
        check_grad(out, exact.grad, dtype)
    else:
        check_like_torch(out, exact.grad, exact.grad.to(dtype), dtype, "gradient")
    assert torch.equal(logit_gradient(z, y, found, inverse, z), out)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("low", [-1e9, -1e30, torch.finfo(torch.float32).min])
def test_huge_logits(low: float):
    """All words forbidden by a finite number: the reference is exact, however large."""
    z, y = torch.full((3, 700), low, device=DEVICE), torch.tensor([0, 699, 5], device=DEVICE)
    found = logit_kernels.logit_stats(z, y, None, 1 / 0.7, entropy=True)
    check_logp(found.logp, torch.full_like(found.logp, -math.log(700)).double(), torch.float32)
    one, out = torch.ones_like(found.logp), torch.empty_like(z)
    logit_kernels.logit_gradient(one, None, one, z, y, found, None, 1 / 0.7, out=out)
    want = (torch.nn.functional.one_hot(y, 700).double() - 1 / 700) / 0.7  # entropy has none
    check_grad(out, want, torch.float32)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("scale", [1, 10, 40, 300])
def test_logits_of_any_spread(scale: int):
    z, y = case(24, 3001, torch.float32)
    z = z * scale / 4
    check(logit_kernels.logit_stats(z, y, None, 1 / 0.9, entropy=True), truth(z, y, 1 / 0.9), torch.float32)


# --- strips of rows ---

#: entropy (moment), label smoothing (average), WPO (squares)
STRIPPED = [fa.GRPO(entropy_coef=0.1), fa.SFT(label_smoothing=0.2), fa.DPO(wpo=True)]


def count_strips(monkeypatch: pytest.MonkeyPatch, columns: int) -> dict[str, int]:
    """-> into how many strips the kernels over tiles cut a row from now on, at most."""
    found: dict[str, int] = {}
    monkeypatch.setattr(launches, "STRIP", columns)
    monkeypatch.setattr(launches, "multiprocessors", lambda device: 1000)
    for name in ("exp_tile", "grad_tile", "kept_tile"):
        original = getattr(launches, f"_{name}")

        def call(*args: Any, name: str = name, original: Any = original, **fixed: object) -> None:
            found[name] = max(found.get(name, 0), args[-1])
            original(*args, **fixed)

        monkeypatch.setattr(launches, f"_{name}", call)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("loss", STRIPPED, ids=loss_id)
@pytest.mark.parametrize("plan", ["recompute", "auto"])
def test_strips(plan: str, loss: fa.Loss, head: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    """Rows that several blocks share; 333 columns are no multiple of a piece, nor of a strip."""
    kernels.use("cuda", monkeypatch)
    at = make_case([4, 0, 2, 3], width=4, H=16, V=333, head=make_head(head, 333, (4, 4))).to(dtype)
    want, want_grad = oracle_loss(at, loss)
    whole, _ = run_loss(at, loss, plan=plan)
    counts = count_strips(monkeypatch, 16)
    found, grads = run_loss(at, loss, plan=plan)
    assert counts["exp_tile"] == 333 // 16 and {*counts.values()} == {333 // 16}
    check_loss(found.loss.detach(), want.detach(), dtype)
    check_loss(found.loss.detach(), whole.loss.detach().double(), dtype)
    for name, grad in grads.items():
        check_grad(grad, want_grad[name], dtype, name)
    assert grads.keys() == want_grad.keys()


@pytest.mark.parametrize("columns", [16, 100, 777])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_statistics_in_strips(dtype: torch.dtype, columns: int, monkeypatch: pytest.MonkeyPatch):
    kernels.use("cuda", monkeypatch)
    at = make_case([5, 3], width=5, H=16, V=777, head=make_head("all", 777, (2, 5))).to(dtype)

    def stats(function: Any, at: Case, **options: Any) -> tuple[list[Tensor], dict[str, Tensor]]:
        leaves = leaves_of(at)
        now = at.with_operands(leaves)
        found = function(now.hidden, now.weight, now.target, **options, **now.head)
        grads = gradients(torch.stack([*found]).sum(), leaves)
        return [x.detach() for x in found], grads

    want, want_grad = stats(oracles.token_stats, at.to(torch.float64))
    ours = partial(stats, fa.token_stats, at, entropy=True, lse=True)
    whole, whole_grad = ours()
    counts = count_strips(monkeypatch, columns)
    found, grads = ours()
    assert counts["exp_tile"] == counts["grad_tile"] == 777 // columns
    for one, other, right in zip(found, whole, want, strict=True):
        if dtype == torch.bfloat16:  # which limits what the whole row gives, too
            check_like_torch(one, right, other, dtype, "statistics")
        else:
            check_logp(one, right, dtype)
    for name, grad in grads.items():
        if dtype == torch.bfloat16:
            check_like_torch(grad, want_grad[name], whole_grad[name], dtype, name)
        else:
            check_grad(grad, want_grad[name], dtype, name)


# --- any order of threads and blocks, and memory beside the arrays ---


class Counting:
    """The module, with the names of what was launched."""

    def __init__(self, module: Any) -> None:
        self.module, self.launched = module, set()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.module, name)
        if callable(found):
            self.launched.add(name)
        return found


#: `make test` has the element types of most calls, in float32 and in 16 bits
TYPES = [
    pytest.param(sanitize.DTYPES, id="float32 bfloat16"),
    pytest.param((torch.float64, torch.float16), id="float64 float16", marks=pytest.mark.slow),
]


@emulation
@pytest.mark.parametrize("dtypes", TYPES)
def test_the_order_of_threads_changes_no_bit(
    dtypes: tuple[torch.dtype, ...], module: Any, monkeypatch: pytest.MonkeyPatch
):
    """Of any kernel: there is no race."""
    counting = Counting(module)
    monkeypatch.setattr(cuda_, "module", counting)

    def results(order: int) -> Iterator[tuple[str, list[Tensor]]]:
        torch.manual_seed(0)
        with emulated.ordered(module, order):
            for name, call in sanitize.calls("cuda", CPU, dtypes):
                yield name, call()

    first = list(results(0))
    for order in (1, 5):
        for (name, want), (_, got) in zip(first, results(order), strict=True):
            assert len(got) == len(want) > 0
            for one, other in zip(got, want, strict=True):
                assert torch.equal(one, other), f"{name}: order {order}"
    every = {name for name in dir(module) if callable(getattr(module, name)) and not name.startswith("_")}
    assert counting.launched == every - {"unserved"}  # which launches nothing


@emulation
@pytest.mark.parametrize("dtypes", TYPES)
def test_no_access_beside_an_array(dtypes: tuple[torch.dtype, ...]):
    """The same calls under AddressSanitizer."""
    program = [Path(__file__).with_name("sanitize.py"), "cuda"]
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    done = subprocess.run(
        [sys.executable, *program, "--dtypes", *names],
        env=emulated.sanitized(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout == "every kernel of cuda ran on cpu\n"


# --- launches that fail ---


def add_products(rows: int = 3, cols: int = 5, **changes: Any) -> None:
    arrays = {"out": torch.zeros(cols), "tile": torch.ones(rows, cols), "coef": torch.ones(rows)}
    arrays = {name: x.cpu() for name, x in arrays.items()} | changes
    sizes = rows, cols, changes.pop("stride", cols)
    launches.launch("add_products", CPU, *arrays.values(), *sizes)


@emulation
@pytest.mark.usefixtures("module")
def test_an_error_of_a_launch_names_the_kernel():
    named = "fused_align's CUDA kernel add_products: "
    array = torch.zeros(9, device=CPU)
    with pytest.raises(RuntimeError, match=named + r"(.|\n)*not aligned"):
        add_products(out=(array.data_ptr() + 1, launches.TYPES[torch.float32]))
    with pytest.raises(RuntimeError, match=named + r"(.|\n)*null pointer"):
        add_products(coef=None)
    add_products()  # and the next launch is as good as any


@emulation
def test_a_device_that_is_not_there(module: Any):
    x = torch.ones(3, device=CPU)
    array = x.data_ptr(), launches.TYPES[x.dtype]
    with pytest.raises(RuntimeError, match="fused_align's CUDA kernel add_products: .*device 0 and no other"):
        module.add_products((1, 0), array, array, array, 1, 3, 3)


@emulation
def test_arguments_that_do_not_fit(module: Any):
    with pytest.raises(ValueError, match="to be float32; got float64"):
        add_products(coef=torch.ones(3, dtype=torch.float64, device=CPU))
    with pytest.raises(ValueError, match="add_products: sums are float32 or float64; got int64"):
        add_products(out=torch.zeros(5, dtype=torch.int64, device=CPU))
    with pytest.raises(ValueError, match="logit_stats: its arguments are of float types; got int64"):
        logit_kernels.logit_stats(
            torch.zeros(3, 9, dtype=torch.int64, device=CPU),
            torch.zeros(3, dtype=torch.int64, device=CPU),
            None,
            1.0,
        )
    with pytest.raises(TypeError, match="add_products: its kernel takes .*; got torch.int16"):
        add_products(out=torch.zeros(5, dtype=torch.int16, device=CPU))
    with pytest.raises(ValueError, match="add_products: all tensors must be on cpu; got .* on meta"):
        add_products(coef=torch.ones(3, device="meta"))
    with pytest.raises(TypeError, match="incompatible function arguments"):
        module.compact((0, 0))


# --- where it runs ---


def test_it_says_why_it_cannot_run(monkeypatch: pytest.MonkeyPatch):
    def why(major: int, minor: int, archs: str = "80 90a 100+PTX", device: str = "cuda") -> str | None:
        found = SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(cuda_, "module", SimpleNamespace(device="cuda", archs=archs))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
        return cuda_.why_not(torch.device(device))

    assert why(9, 0) is why(8, 6) is why(12, 0) is None
    assert why(7, 5) == "it needs compute capability 8.0; this GPU has 7.5"
    assert why(9, 0, "100") == (
        "its module was built for 100, and this GPU is 90 (install with FUSED_ALIGN_CUDA_ARCHS=90)"
    )
    assert why(9, 0, device="cpu") == "its kernels need tensors on cuda, and these are on cpu"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert why(9, 0) == "its kernels need an NVIDIA GPU"


#: what was compiled for, a GPU, and whether code runs there
CODE = [
    ("80", (8, 0), True), ("80", (8, 9), True), ("80", (9, 0), False), ("86", (8, 0), False),
    ("80+PTX", (7, 5), False), ("80+PTX", (9, 0), True), ("80+PTX", (12, 1), True),
    ("90a", (9, 0), True), ("90a", (10, 0), False), ("90a", (8, 9), False), ("90a+PTX", (10, 0), False),
    ("80 90a", (9, 0), True), ("80+PTX 90a", (10, 0), True), ("80 90a 100", (10, 3), True),
    ("80 90a 100", (12, 0), False), ("100+PTX", (9, 0), False), ("80 90a 100+PTX", (12, 0), True),
    ("100f", (10, 3), True), ("103f", (10, 0), False), ("100f", (12, 0), False), ("100f+PTX", (12, 0), False),
]  # fmt: skip


@pytest.mark.parametrize("archs, gpu, runs", CODE, ids=str)
def test_code_for_a_gpu(archs: str, gpu: tuple[int, int], runs: bool):
    assert cuda_._has_code(archs, *gpu) == runs


def test_a_module_that_was_not_built(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cuda_, "NAME", "fused_align._nowhere")
    monkeypatch.setattr(cuda_, "module", cuda_._built())
    with pytest.raises(
        RuntimeError, match="backend 'cuda' cannot run here: its module was not built: .*nvcc"
    ):
        backends.pick("cuda", CPU)


STUB = "def unserved(): raise RuntimeError('the driver is a stub')"
OLD = "def unserved(): return 'the driver is too old'"
MODULES = [
    ("raise ImportError('libcuda.so.9 is missing')", "cannot be used: libcuda.so.9 is missing"),
    (f"interface = {cuda_.INTERFACE}\n{STUB}", "cannot be used: the driver is a stub"),
    (f"interface = {cuda_.INTERFACE}\n{OLD}", "the driver is too old"),
    (f"interface = {cuda_.INTERFACE - 1}\n{OLD}", "built from other sources"),
    (OLD, "cannot be used: module .* has no attribute 'interface'"),
]


@pytest.mark.parametrize(("source", "reason"), MODULES, ids=["load", "stub", "driver", "older", "oldest"])
def test_a_module_that_cannot_be_used(
    source: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    name = f"built_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(cuda_, "NAME", name)
    found = cuda_._built()
    assert isinstance(found, str) and re.search(reason, found)


def test_how_many_blocks_share_a_sequence(monkeypatch: pytest.MonkeyPatch):
    """Several where sequences are few and long, and tokens do not depend on each other."""
    monkeypatch.setattr(launches, "multiprocessors", lambda device: 132)

    def pieces(loss: fa.Loss, S: int, T: int) -> int:
        batch = fa.Batch(
            torch.ones(S, T, dtype=torch.int64), advantage=torch.ones(S), sampler_logp=torch.zeros(S, T)
        )
        found = backends.steps("cuda").loss_kernel(loss, None)
        assert found is not None
        one = found.launch(torch.zeros(S, T), batch, 1.0)
        return launches._pieces(one, CPU)

    assert pieces(fa.GRPO(), 1, 16384) == 16 and pieces(fa.GRPO(), 8, 2048) == 2
    assert pieces(fa.GRPO(), 8, 1024) == pieces(fa.GRPO(), 200, 2048) == 1
    assert pieces(fa.GSPO(), 1, 16384) == pieces(fa.RLOO(), 1, 16384) == 1
    assert pieces(fa.GRPO(sampler_correction="sequence_mask", sampler_max=2.0), 1, 16384) == 1
    assert pieces(fa.GRPO(sampler_correction="token_mask", sampler_max=2.0), 1, 16384) == 16


@emulation
def test_auto_is_torch_on_a_cpu_where_the_emulation_could(module: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("FUSED_ALIGN_BACKEND")
    assert backends.pick("cuda", CPU) == "cuda"
    assert backends.pick("auto", CPU) == "torch"
    why = "its kernels need tensors on cpu, and these are on cuda:0"
    assert cuda_.why_not(torch.device("cuda:0")) == why


# --- numbers that Python and C++ share ---


def test_the_interface_is_one():
    found = re.search(r"constexpr int INTERFACE = (\d+);", (emulated.CSRC / "launches.h").read_text())
    assert found is not None and int(found[1]) == cuda_.INTERFACE


def enums_of_cpp(file: str) -> dict[str, dict[str, int]]:
    """The enums of a header of csrc/ by name: the number of each name."""
    source = (emulated.CSRC / file).read_text()
    found = {}
    for name, body in re.findall(r"enum class (\w+)\s*:\s*int\s*\{(.*?)\}", source, re.DOTALL):
        assert "=" not in body, f"{name}: numbers from 0 on"
        found[name] = {each.strip(): number for number, each in enumerate(body.split(","))}
    return found


def test_codes_are_those_of_the_headers():
    mine = {
        name: {each.name.lower(): each.value for each in codes_}
        for name, codes_ in vars(codes).items()
        if isinstance(codes_, type) and issubclass(codes_, enum.IntEnum) and codes_ is not enum.IntEnum
    }
    theirs = enums_of_cpp("policy.cuh") | enums_of_cpp("preference.cuh")
    assert mine == theirs
    assert all(list(mine[name]) == list(theirs[name]) for name in mine)


def test_element_types_are_those_of_the_header():
    theirs = enums_of_cpp("launches.h")["Type"]
    mine = {str(dtype).removeprefix("torch."): number for dtype, number in launches.TYPES.items()}
    assert mine.pop("bool") == mine["uint8"]
    assert {"none": 0, **mine} == theirs
