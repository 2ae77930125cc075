"""Which backend runs; rounded logits and far offsets in kernels; triton's plan `fused` and its tuning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kernels
import pytest
import torch
from cases import make_case, make_head, randn, run_loss
from tolerances import check_like_torch
from torch import Tensor

import fused_align as fa
import oracles
from fused_align import backends

KIB = 1 << 10
GPU = torch.cuda.is_available()


def operands(dtype: torch.dtype = torch.float32, rows: int = 50) -> tuple[Tensor, Tensor, Tensor]:
    """hidden and weight of few bits, so that float32 products are exact in any order; a fifth is ignored."""
    hidden, weight = ((4 * randn(n, 24, seed=n)).round() / 4 for n in (rows, 333))
    target = torch.arange(rows) * 7 % 333
    target[::5] = -100
    return hidden.to(dtype), weight.to(dtype), target


# --- the choice ---


def test_auto_is_torch_on_a_cpu_even_where_the_interpreter_could():
    assert backends.pick("auto", torch.device("cpu")) == "torch"


def test_the_environment_chooses_what_auto_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FUSED_ALIGN_BACKEND", "eager")
    assert backends.pick("auto", torch.device("cpu")) == "eager"
    assert backends.pick("torch", torch.device("cpu")) == "torch"
    monkeypatch.setenv("FUSED_ALIGN_BACKEND", "cudnn")
    with pytest.raises(ValueError, match=r"got 'cudnn' \(from FUSED_ALIGN_BACKEND\)"):
        fa.linear_logp(*operands())


def test_triton_says_why_not(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backends.triton_, "INSTALLED", "3.6.0")
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: its kernels need a GPU"):
        backends.pick("triton", torch.device("cpu"))
    assert "need an NVIDIA or AMD GPU" in str(dict(backends.table("meta"))["triton"])
    for version, reason in ((None, "pip install triton"), ("3.3.1", "needs Triton 3.6; got 3.3.1")):
        monkeypatch.setattr(backends.triton_, "INSTALLED", version)
        assert reason in str(dict(backends.table("cpu"))["triton"])


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.use("triton", monkeypatch)


# --- plan fused ---


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_is_score(dtype: torch.dtype):
    hidden, weight, target = operands(dtype)
    want = fa.token_stats(hidden, weight, target, plan="score", entropy=True, lse=True)
    got = fa.token_stats(hidden, weight, target, plan="fused", entropy=True, lse=True)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("head", ["plain", "all"])
def test_a_row_depends_on_itself_alone(head: str):
    hidden, weight, target = operands()
    options = make_head(head, 333, (50,))
    options = {k: v.float() if isinstance(v, Tensor) else v for k, v in options.items()}

    def some(rows: slice) -> Tensor:
        heat = options.get("temperature", 1.0)
        heat = heat[rows] if isinstance(heat, Tensor) else heat
        return fa.linear_logp(
            hidden[rows], weight, target[rows], **{**options, "temperature": heat}, plan="fused"
        )

    whole = some(slice(None))
    for rows in (slice(0, 1), slice(3, 4), slice(10, 33)):
        assert torch.equal(some(rows), whole[rows])
    hidden[0] *= 1e4  # leaves the range of float32, or is ignored
    hidden[1] *= 1e4
    assert torch.equal(some(slice(2, 50)), whole[2:])


@pytest.mark.usefixtures("triton")
def test_fused_says_what_it_cannot():
    hidden, weight, target = operands()
    with pytest.raises(ValueError, match="fused computes no gradients"):
        fa.linear_logp(hidden, weight.requires_grad_(), target, plan="fused")
    with torch.no_grad(), pytest.raises(ValueError, match="operands of one dtype"):
        fa.linear_logp(hidden.double(), weight, target, plan="fused")
    with torch.no_grad(), pytest.raises(ValueError, match="float16 on a GPU only"):
        fa.linear_logp(hidden.cpu().half(), weight.cpu().half(), target.cpu(), plan="fused")
    with torch.no_grad(), pytest.raises(ValueError, match="adjacent columns"):
        fa.linear_logp(hidden.t().contiguous().t(), weight, target, plan="fused")
    with torch.no_grad(), pytest.raises(ValueError, match="a kernel of the backend triton"):
        fa.linear_logp(hidden, weight, target, plan="fused", backend="torch")


# --- rounded logits ---


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("plan", ["score", "jacobian", "recompute"])
def test_rounded_logits(plan: str, dtype: torch.dtype):
    case = make_case([13, 20, 0, 9], width=20, H=23, V=777).flat().to(dtype)
    want, _, _ = oracles.token_stats(case.hidden.double(), case.weight.double(), case.target)
    plain, _, _ = oracles.token_stats(case.hidden, case.weight, case.target)
    hidden = case.hidden.clone().requires_grad_(plan != "score")
    weight = case.weight.clone().requires_grad_(plan == "recompute")
    got = fa.linear_logp(hidden, weight, case.target, plan=plan, precision="bf16", workspace_bytes=99 * KIB)
    check_like_torch(got.detach(), want, plain, dtype, "logp")
    if plan == "score":
        return
    wide, plain_hidden = case.hidden.double().requires_grad_(), case.hidden.clone().requires_grad_()
    oracles.token_stats(wide, case.weight.double(), case.target)[0].sum().backward()
    oracles.token_stats(plain_hidden, case.weight, case.target)[0].sum().backward()
    got.sum().backward()
    assert hidden.grad is not None and wide.grad is not None and plain_hidden.grad is not None
    check_like_torch(hidden.grad, wide.grad, plain_hidden.grad, dtype, "hidden")


# --- offsets beyond 2^31 ---


def far_apart(x: Tensor, by_column: bool) -> Tensor:
    """The same rows 2^30 elements apart, or columns 2^27. Pages that nobody touches take no memory."""
    strides = (1, 2**27) if by_column else (2**30, 1)
    size = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + 1
    return torch.empty(size, dtype=x.dtype, device="cpu").as_strided(x.shape, strides).copy_(x)


@pytest.mark.usefixtures("backend")
@pytest.mark.skipif(GPU, reason="a GPU has no pages that take no memory")
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("plan", ["jacobian", "recompute"])
def test_elements_far_apart(plan: str, by_column: bool):
    hidden, weight, target = (x[:5].contiguous() for x in operands(torch.bfloat16))
    target = torch.tensor([4, -100, 3, 0, 3])

    def run(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        main_grad = torch.zeros(weight.shape)
        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_(plan == "recompute")
        options = {} if plan == "jacobian" else {"main_grad": main_grad}
        logp = fa.linear_logp(h, w, target, plan=plan, **options)
        logp.sum().backward()
        assert h.grad is not None
        return logp.detach(), h.grad, main_grad

    apart = far_apart(hidden, by_column), far_apart(weight, by_column)
    for one, other in zip(run(*apart), run(hidden, weight), strict=True):
        torch.testing.assert_close(one, other)


# --- tuning ---


@pytest.mark.usefixtures("triton")
def test_tuning_changes_no_result(monkeypatch: pytest.MonkeyPatch):
    """Every candidate runs, twice; what a kernel adds to is put back before the one that counts."""
    from fused_align.backends.triton_ import tuning

    tried: list[int] = []

    def timer(call: Callable[[], Any], quantiles: object) -> list[float]:
        call(), call()
        tried.append(1)
        return [1.0, 1.0, 1.0]

    case = make_case([5, 7], width=8, H=16, V=300, head=make_head("bias", 300, (2, 8))).to(torch.float32)
    for frozen in ((), ("weight", "bias")):
        want, want_grad = run_loss(case, fa.SFT(), plan="recompute", workspace_bytes=60 * KIB, frozen=frozen)
        with monkeypatch.context() as patch:
            patch.setenv("FUSED_ALIGN_TUNE", "1")
            patch.setattr(tuning, "timer", timer)
            tuning._tuned.cache_clear()
            got, grads = run_loss(case, fa.SFT(), plan="recompute", workspace_bytes=60 * KIB, frozen=frozen)
            tuning._tuned.cache_clear()
        torch.testing.assert_close(got.loss, want.loss)
        for name, grad in grads.items():
            torch.testing.assert_close(grad, want_grad[name])
    assert len(tried) > 10


@pytest.mark.usefixtures("triton")
def test_tuned_scoring_is_kept_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from fused_align.backends.triton_ import score, tuning

    tried: list[int] = []

    def timer(call: Callable[[], Any], quantiles: object) -> list[float]:
        call()
        tried.append(1)
        return [1.0 / len(tried)] * 3  # the last one wins

    hidden, weight, target = operands()
    want = fa.linear_logp(hidden, weight, target, plan="fused")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("FUSED_ALIGN_TUNE", "1")
    monkeypatch.setattr(tuning, "timer", timer)
    counts = []
    for _ in range(2):  # another process would start with an empty dictionary
        monkeypatch.setattr(score, "_tuned", {})
        got = fa.linear_logp(hidden, weight, target, plan="fused")
        torch.testing.assert_close(got, want)
        counts.append(len(tried))
    tuning._tuned.cache_clear()
    assert counts[0] == counts[1] > 1
    assert [found.cols for found in score._tuned.values()] == [32] or GPU
    assert torch.equal(fa.linear_logp(hidden[:7], weight, target[:7], plan="fused"), got[:7])


def test_every_launch_fits_its_kernel():
    pytest.importorskip("triton", reason="triton is not installed")
    from fused_align.backends.triton_ import tuning

    launches = dict(tuning.launches())
    assert len(launches) == 12
    for name, launch in launches.items():
        names = set(launch.kernel.arg_names)
        assert {*launch.key, *launch.adds_to} <= names, name
        for blocks in (launch.default, launch.interpreted, *launch.others):
            assert {*launch.grid} - {None} <= set(blocks.sizes()) <= names, name
