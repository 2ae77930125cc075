"""The custom ops keep torch.library's rules and compile into one graph; an own loss takes ten lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import (
    Case,
    fresh,
    generator,
    gradients,
    leaves_of,
    loss_id,
    make_case,
    make_head,
    plans_for,
    run_loss,
)
from tolerances import check_grad, check_loss
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import fused_align as fa
import oracles


@dataclass
class Calls:
    """Every call of an op of ours, with its arguments."""

    found: list[tuple[Any, tuple, dict]] = field(default_factory=list)

    def record(self) -> TorchDispatchMode:
        found = self.found

        class Record(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func.namespace == "fused_align":
                    found.append((func, args, dict(kwargs or {})))
                return func(*args, **(kwargs or {}))

        return Record()


def small(head: str = "plain", dtype: torch.dtype = torch.float32) -> Case:
    return make_case([3, 1, 0, 5], width=6, H=7, V=19, head=make_head(head, 19, (4, 6))).to(dtype)


@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outputs", ["logp", "all"])
def test_opcheck(head: str, frozen: bool, dtype: torch.dtype, outputs: str):
    case = small(head, dtype)
    leaves = leaves_of(case, ("weight", "bias") if frozen else ())
    at = case.with_operands(leaves)
    calls = Calls()
    with calls.record():
        every = outputs == "all"
        stats = fa.token_stats(at.hidden, at.weight, at.target, **at.head, entropy=every, lse=every)
        sum((x.sum() for x in stats if x is not None), torch.zeros(())).backward()
    assert len(calls.found) == 2, "one forward and one backward op"
    for number, (op, args, kwargs) in enumerate(calls.found):

        def fresh(x: Any, needs_grad: bool = number == 0) -> Any:
            if not isinstance(x, Tensor):
                return x
            return x.detach().clone().requires_grad_(x.requires_grad and needs_grad)

        torch.library.opcheck(op, tree_map(fresh, args), tree_map(fresh, kwargs))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_into_one_graph(head: str, frozen: bool, dynamic: bool):
    case = small(head)
    keep = ("weight", "bias") if frozen else ()

    def function(hidden: Tensor, weight: Tensor, target: Tensor, head: dict) -> Tensor:
        return (fa.linear_logp(hidden * 2, weight, target, **head) ** 2).sum()

    def run(call: Any, at: Case) -> tuple[Tensor, dict[str, Tensor]]:
        leaves = leaves_of(at, keep)
        here = at.with_operands(leaves)
        value = call(here.hidden, here.weight, here.target, here.head)
        return value.detach(), gradients(value, leaves)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    cut = Case(case.hidden[:3], case.weight, case.target[:3], dict(case.head))
    if torch.is_tensor(cut.head.get("temperature")):
        cut.head["temperature"] = cut.head["temperature"][:3]
    for at in (case, cut):  # the second time with another size
        value, grads = run(compiled, at)
        want, want_grads = run(function, at)
        torch.testing.assert_close(value, want)
        assert grads.keys() == want_grads.keys()
        for name, grad in grads.items():
            torch.testing.assert_close(grad, want_grads[name], msg=name)


@pytest.mark.usefixtures("fresh_compiler")
def test_logits_with_temperatures_compile_into_one_graph():
    logits, target = torch.randn(6, 9, generator=generator(0)), torch.arange(6)
    temperature = torch.linspace(0.5, 2, 6)

    def call(logits: torch.Tensor) -> torch.Tensor:
        return fa.logp_from_logits(logits, target, temperature=temperature)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), call(logits), rtol=0, atol=0)
    assert fa.logp_from_logits(logits.to("meta"), target.to("meta"), temperature=temperature.to("meta")).shape


def test_compiles_all_statistics():
    case = small("all")

    def function(at: Case) -> Tensor:
        stats = fa.token_stats(at.hidden, at.weight, at.target, **at.head, entropy=True, lse=True)
        assert stats.entropy is not None and stats.lse is not None
        return (stats.logp - 0.1 * stats.entropy + stats.lse**2).sum()

    leaves, other = leaves_of(case), leaves_of(case)
    compiled = torch.compile(
        lambda: function(case.with_operands(leaves)), fullgraph=True, backend="aot_eager"
    )
    got, want = gradients(compiled(), leaves), gradients(function(case.with_operands(other)), other)
    for name, grad in got.items():
        torch.testing.assert_close(grad, want[name], msg=name)


# --- losses of one's own ---


@pytest.fixture
def own_losses() -> Iterator[dict[str, type[fa.Loss]]]:
    """Losses as a user would write them; the registry is put back afterwards."""
    before = dict(fa.Loss.registry)

    @dataclass(frozen=True)
    class Focal(fa.Loss):
        gamma: float = 2.0
        item = "token"
        anchor = None

        def items(self, logp: Tensor, log_ratio: Tensor, batch: fa.Batch) -> Tensor:
            return -((1 - logp.exp()) ** self.gamma) * logp

    @dataclass(frozen=True)
    class Squared(fa.Loss):
        item = "sequence"
        anchor = "ref"

        def items(self, logp: Tensor, log_ratio: Tensor, batch: fa.Batch) -> Tensor:
            return batch.mean(log_ratio) ** 2

    @dataclass(frozen=True)
    class Hinge(fa.Loss):
        beta: float = 0.5
        item = "pair"
        anchor = "ref"

        def items(self, logp: Tensor, log_ratio: Tensor, batch: fa.Batch) -> Tensor:
            total = batch.sum(log_ratio)
            return torch.relu(1 - self.beta * (batch.chosen(total) - batch.rejected(total)))

    yield {"focal": Focal, "squared": Squared, "hinge": Hinge}
    fa.Loss.registry.clear()
    fa.Loss.registry.update(before)


def dense_own(name: str, x: oracles.Tokens) -> Tensor:
    assert x.ref_logp is not None
    if name == "focal":
        logp = torch.cat([x.live(x.logp, s) for s in x.rows])
        return (-((1 - logp.exp()) ** 2) * logp).mean()
    ratios = [x.log_ratio(x.ref_logp, s) for s in x.rows]
    if name == "squared":
        return torch.stack([(r.sum() / max(r.numel(), 1)) ** 2 for r in ratios]).mean()
    half = len(ratios) // 2
    margins = [ratios[i].sum() - ratios[i + half].sum() for i in range(half)]
    return torch.stack([torch.relu(1 - 0.5 * d) for d in margins]).mean()


COMPILED = [
    fa.GSPO(),
    fa.CPO(),
    fa.SFT(label_smoothing=0.1),
    fa.BCO(),
    fa.BetaDPO(),
    fa.GRPO(top_entropy=0.5),
]


@pytest.mark.parametrize("loss", COMPILED, ids=loss_id)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at those of views
def test_losses_compile(loss: fa.Loss):
    """Per token, sequence, pair and batch, with state too: three steps equal those that are not compiled."""
    case = small()

    def value(loss: fa.Loss, leaves: dict[str, Tensor]) -> Tensor:
        return fa.align_loss(leaves["hidden"], leaves["weight"], case.batch(), loss).loss

    torch._dynamo.reset()
    plain, own, compiled = fresh(loss), fresh(loss), torch.compile(value, backend="aot_eager")
    for _ in range(3):
        leaves, same = leaves_of(case), leaves_of(case)
        want, got = value(plain, leaves), compiled(own, same)
        check_loss(got.detach(), want.detach().double(), torch.float32)
        want_grads = gradients(want, leaves)
        for name, grad in gradients(got, same).items():
            check_grad(grad, want_grads[name].double(), torch.float32, name)


@pytest.mark.parametrize("name", ["focal", "squared", "hinge"])
def test_a_loss_of_ones_own(own_losses: dict[str, type[fa.Loss]], name: str):
    loss = own_losses[name]()
    assert fa.Loss.registry[name] is own_losses[name]
    case = small(dtype=torch.float64)
    leaves = leaves_of(case)
    at = case.with_operands(leaves)
    logp, _, _ = oracles.token_stats(at.hidden, at.weight, at.target)
    want = dense_own(name, oracles.Tokens(logp, case.mask, ref_logp=case.columns["ref_logp"]))
    want_grads = gradients(want, leaves)
    for plan in plans_for(loss):
        out, grads = run_loss(case, loss, plan=plan)
        check_loss(out.loss.detach(), want.detach(), torch.float64)
        for operand, grad in grads.items():
            check_grad(grad, want_grads[operand], torch.float64, f"{plan} {operand}")


def test_a_loss_must_say_what_it_couples():
    with pytest.raises(TypeError, match=r"(?s)Odd.*item.*pair.*'triple'"):

        @dataclass(frozen=True)
        class Odd(fa.Loss):
            item = "triple"

            def items(self, logp: Tensor, log_ratio: Tensor, batch: fa.Batch) -> Tensor:
                return logp

    assert "odd" not in fa.Loss.registry


def test_items_of_the_wrong_number(own_losses: dict[str, type[fa.Loss]]):
    class Wrong(own_losses["squared"]):
        def items(self, logp: Tensor, log_ratio: Tensor, batch: fa.Batch) -> Tensor:
            return log_ratio

    with pytest.raises(ValueError, match=r"(?s)Wrong.*sequence.*\[4\].*\[9\]"):
        run_loss(small(), Wrong())
