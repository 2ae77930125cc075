"""The fused scoring kernel against the oracle, and each of its rows against the same row elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles_base import token_stats
from tolerances import check_logp
from torch import Tensor

from fused_align.backends import triton_

kernels = pytest.importorskip("fused_align.backends.triton_.score", exc_type=ImportError)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = pytest.mark.skipif(triton_.why_not(DEVICE) is not None, reason=str(triton_.why_not(DEVICE)))

LOG2E, LN2 = 1 / math.log(2), math.log(2)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 3.0},
    "temperature": {"temperature": 0.7},
    "scale": {"logit_scale": -0.5},
    "everything": {"bias": True, "softcap": 3.0, "temperature": True, "logit_scale": 0.5},
}
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Case:
    """Operands of a head, and what `linear.passes.load` makes of them."""

    def __init__(self, n: int, H: int, V: int, dtype: torch.dtype, *, seed: int = 0, **head: Any) -> None:
        maker = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=maker)

        self.x = (2 * randn(n, H) / math.sqrt(H)).to(dtype).to(DEVICE)
        self.weight = (2 * randn(V, H)).to(dtype).to(DEVICE)
        self.bias = randn(V).to(dtype).to(DEVICE) if head.get("bias") else None
        self.target = torch.randint(0, V, (n,), generator=maker).to(DEVICE)
        heat = head.get("temperature", 1.0)
        self.heat = (0.5 + randn(n).abs()).float().to(DEVICE) if heat is True else heat
        self.scale, self.cap = head.get("logit_scale", 1.0), head.get("softcap")

    def rows(self, index: Any) -> Case:
        some = object.__new__(Case)
        vectors = {"x": self.x[index], "target": self.target[index]}
        if isinstance(self.heat, Tensor):
            vectors["heat"] = self.heat[index]
        some.__dict__.update(self.__dict__ | vectors)
        return some

    def oracle(self) -> tuple[Tensor, Tensor, Tensor]:
        """logp, entropy, lse [n] float64."""
        return token_stats(
            self.x.double(), self.weight.double(), self.target,
            bias=None if self.bias is None else self.bias.double(), logit_scale=self.scale,
            softcap=self.cap, temperature=self.heat.double() if isinstance(self.heat, Tensor) else self.heat,
        )  # fmt: skip

    def own(self) -> Tensor:
        """The targets' logits [n] float64."""
        logp, _, lse = self.oracle()
        return logp + lse

    def run(self, *, entropy: bool = False, ref: Tensor | None = None, **more: Any) -> tuple:
        """What the kernel returns."""
        if ref is None:
            ref = (self.own() * LOG2E + 58).round().float()
        gain = (self.scale if self.cap is None else self.cap) * LOG2E / self.heat
        return kernels.fused_score(
            self.x, self.weight, self.bias, self.target, ref,
            inner=1.0 if self.cap is None else self.scale / self.cap, gain=gain,
            capped=self.cap is not None, entropy=entropy,
            pivot=ref.double() - self.own() * LOG2E if entropy else None, **more,
        )  # fmt: skip

    def check(self, dtype: torch.dtype, *, entropy: bool = True, **more: Any) -> None:
        ref, total, moment, pivot = self.run(entropy=entropy, **more)
        offset = ref.double() - self.own() * LOG2E
        logp = -torch.nn.functional.softplus(total.double().log() + offset * LN2, threshold=700)
        want = self.oracle()
        check_logp(logp, want[0], dtype)
        if entropy:
            inverse = 1 / (total.double() + torch.exp2(-offset))
            check_logp(-logp - inverse * LN2 * (moment + (offset - pivot) * total.double()), want[1], dtype)


def same(one: tuple, other: tuple, index: Any = slice(None)) -> None:
    """Bit by bit."""
    for got, want in zip(one, other, strict=True):
        if got is not None:
            assert torch.equal(got, want[index])


@every_dtype
@pytest.mark.parametrize("n, H, V", [(1, 3, 1), (5, 23, 7), (37, 70, 131), (37, 64, 777)])
def test_sizes(n: int, H: int, V: int, dtype: torch.dtype):
    Case(n, H, V, dtype).check(dtype)


@every_dtype
@pytest.mark.parametrize("head", HEADS)
def test_heads(head: str, dtype: torch.dtype):
    Case(21, 40, 333, dtype, **HEADS[head]).check(dtype)
    Case(5, 23, 131, dtype, **HEADS[head]).check(dtype, entropy=False)


@pytest.mark.parametrize("head", ["plain", "everything"])
def test_a_total_without_moments(head: str):
    case = Case(21, 40, 333, torch.float32, **HEADS[head])
    ref, total, moment, pivot = case.run()
    assert moment is None and pivot is None
    if triton_.interpreted():  # on a GPU moments may take other tiles
        same((ref, total), case.run(entropy=True)[:2])


@pytest.mark.parametrize("head", ["plain", "everything"])
@every_dtype
def test_hopeless_targets(head: str, dtype: torch.dtype):
    """log p of -300 and below: references move, in more than one tile, and sums are scaled."""
    options: dict[str, Any] = HEADS[head] | ({"softcap": 400.0} if head != "plain" else {})
    case = Case(20, 40, 700, dtype, **options)
    case.weight[300] = 0
    case.weight[300, 0], case.weight[650, 0] = 40, 45  # the second beyond the first
    case.x[::3, 0] = 16 if dtype == torch.float32 else 10
    case.target[case.target >= 300] -= 300
    want = case.oracle()[0]
    assert want.min() < -300 and want.max() > -50
    case.check(dtype)
    ref, _, _, pivot = case.run(entropy=True)
    start = (case.own() * LOG2E + 58).round().float()
    moved = ref != start
    assert moved[::3].all() and not moved[1::3].any() and (pivot[moved] == 0).all()
    assert ((ref - start) == (ref - start).round()).all()


@every_dtype
def test_a_row_depends_on_itself_alone(dtype: torch.dtype):
    """Alone, among others, in another order, beside rows whose references move or that hold anything."""
    case = Case(37, 70, 333, dtype)
    # Of few bits, so that products are exact: numpy's, in the interpreter, round a row by its place
    case.x, case.weight = (32 * case.x).round() / 32, (4 * case.weight).round() / 4
    case.weight[200, 0] = 60
    case.x[[4, 20], 0] = 20
    case.target[[4, 20]] = 7
    ref = (case.own() * LOG2E + 58).round().float()
    every = case.run(entropy=True, ref=ref)
    assert (every[0] != ref)[[4, 20]].all(), "two neighbours move"
    for row in (0, 4, 36):
        index = slice(row, row + 1)
        same(case.rows(index).run(entropy=True, ref=ref[index]), every, index)
    calm = [i for i in range(37) if i not in (4, 20)]
    same(case.rows(calm).run(entropy=True, ref=ref[calm]), every, calm)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    same(case.rows(order).run(entropy=True, ref=ref[order]), every, order)
    twice = torch.arange(74, device=DEVICE) % 37
    same(case.rows(twice).run(entropy=True, ref=ref[twice]), every, twice)
    same(case.run(entropy=True, ref=ref), every)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow):RuntimeWarning")  # numpy, of inf and NaN
def test_bad_rows_keep_to_themselves():
    case = Case(20, 24, 200, torch.float32)
    ref = (case.own() * LOG2E + 58).round().float()
    clean = case.run(ref=ref)
    for row, bad in ((3, torch.nan), (8, torch.inf), (15, -torch.inf), (16, 3e38)):
        case.x[row, 5] = bad
    ref[11] = torch.nan
    found = case.run(ref=ref)
    good = [i for i in range(20) if i not in (3, 8, 11, 15, 16)]
    same(tuple(None if t is None else t[good] for t in found), clean, good)
    assert found[1][[3, 11]].isnan().all()


def test_banned_tokens():
    """A bias of -inf."""
    case = Case(9, 24, 200, torch.float32, bias=True)
    assert case.bias is not None
    case.bias[50:150] = -torch.inf
    case.target = case.target % 50
    ref, total, moment, _ = case.run(entropy=True, ref=torch.full((9,), 40.0, device=DEVICE))
    kept = torch.cat([torch.arange(50), torch.arange(150, 200)]).to(DEVICE)
    case.weight, case.bias = case.weight[kept], case.bias[kept]
    fewer = case.run(entropy=True, ref=torch.full((9,), 40.0, device=DEVICE))
    assert torch.equal(ref, fewer[0])
    assert torch.allclose(total, fewer[1], rtol=1e-6) and torch.allclose(moment, fewer[2], rtol=1e-6)


def test_targets_outside_the_vocabulary_hide_nothing():
    case = Case(6, 24, 200, torch.float32)
    z = case.x.double() @ case.weight.double().T
    ref = torch.full((6,), 10.0, device=DEVICE)
    case.target = torch.tensor([-100, -1, 200, 255, 2**32 + 3, 2**40], device=DEVICE)
    total = case.run(ref=ref)[1]
    want = torch.exp2(z * LOG2E - 10).sum(1)
    assert torch.allclose(total.double(), want, rtol=1e-5)


@every_dtype
def test_strides(dtype: torch.dtype):
    """Rows of x and weight apart, with what stands between them unread; by pointers and by TMA."""
    case = Case(19, 32, 200, dtype)
    ref = (case.own() * LOG2E + 58).round().float()
    want = case.run(ref=ref)
    for gap in (1, 32):
        wide = [
            torch.full((len(m), 32 + gap), torch.nan, dtype=dtype, device=DEVICE)
            for m in (case.x, case.weight)
        ]
        for into, matrix in zip(wide, (case.x, case.weight), strict=True):
            into[:, :32] = matrix
        apart = case.rows(slice(None))
        apart.x, apart.weight = wide[0][:, :32], wide[1][:, :32]
        found = apart.run(ref=ref)
        if triton_.interpreted() or gap == 32:
            same(found, want)
        assert torch.allclose(found[1], want[1], rtol=1e-5)


def test_offsets_beyond_32_bits():
    """Rows of the weight 2^30 elements apart; memory that is not touched is not there."""
    apart = 2**30 + 8
    case = Case(3, 8, 3, torch.bfloat16)
    try:
        storage = torch.empty(3 * apart, dtype=torch.bfloat16, device=DEVICE)
    except RuntimeError:
        pytest.skip("no room for 6 GB of addresses")
    ref = (case.own() * LOG2E + 58).round().float()
    want = case.run(ref=ref)
    for offset in (0, 1):  # by TMA, and by pointers
        far = storage[offset:].as_strided((3, 8), (apart, 1))
        far.copy_(case.weight)
        case.weight = far
        found = case.run(ref=ref)
        assert torch.allclose(found[1], want[1], rtol=1e-6) and torch.equal(found[0], want[0])


def test_any_number_of_programs_and_bands():
    """The grid and the order of the items change nothing; the groups' number does, in the last digits."""
    case = Case(70, 24, 500, torch.float32)
    ref = (case.own() * LOG2E + 58).round().float()
    sizes = kernels.config(DEVICE, torch.float32)
    want = case.run(entropy=True, ref=ref, sizes=sizes)
    same(case.run(entropy=True, ref=ref, sizes=replace(sizes, band=3)), want)
    for programs in (1, 3, 7):
        found = case.run(entropy=True, ref=ref, sizes=replace(sizes, programs=programs))
        assert torch.allclose(found[1], want[1], rtol=1e-6)


def test_nothing():
    case = Case(3, 8, 5, torch.float32).rows(slice(0, 0))
    ref = torch.empty(0, device=DEVICE)
    assert all(t.shape == (0,) for t in case.run(entropy=True, ref=ref))


def test_what_it_refuses():
    x = torch.zeros(3, 8, device=DEVICE)
    assert kernels.why_not(x, x) is None
    for weight, reason in ((x.bfloat16(), "one dtype"), (x.double(), "one dtype"), (x.t(), "adjacent")):
        assert reason in kernels.why_not(x, weight)
    assert "float64" in kernels.why_not(x.double(), x.double())
    y = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="cannot run"):
        kernels.fused_score(x.double(), x.double(), None, y, x[:, 0], inner=1.0, gain=1.0)
    with pytest.raises(ValueError, match="pivot"):
        kernels.fused_score(x, x, None, y, x[:, 0], inner=1.0, gain=1.0, entropy=True)


def test_sizes_do_not_depend_on_the_rows():
    for sizes in (*kernels.CONFIGS.values(), kernels.INTERPRETED):
        for vocab in (1, 777, 32_000, 128_256, 2**18):
            groups, per = kernels.split(vocab, replace(sizes, programs=132))
            assert (groups - 1) * per * sizes.cols < vocab <= groups * per * sizes.cols and groups <= 132
    cpu = torch.device("cpu")
    if kernels.interpreted():  # the larger of the default's 2 groups and the 4 of what tuning may try
        assert kernels.partial_bytes(10, 128, cpu, torch.float32, True) == 10 * 4 * 16
