"""A loss of one's own, defined outside the package in ten lines, does whatever the package's own do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import training
from cases import (
    HUMANLINE,
    REGISTRY,
    Case,
    gradcheck,
    gradients,
    leaves_of,
    make_case,
    make_head,
    plans_for,
    run_loss,
)
from tolerances import DIFFERENCE, DIFFERENCE_STEP, check_grad, check_loss
from torch import Tensor

import fused_align as fa
import oracles
from fused_align.losses.policy import PolicyLoss
from fused_align.losses.preference import PairLoss

F64 = torch.float64
LENGTHS = [4, 1, 0, 5, 2, 3]
Losses = dict[str, type[fa.Loss]]


def defined() -> None:
    """The losses as a user would write them; they enter the registry."""

    @dataclass(frozen=True)
    class MyToken(fa.Loss):
        """(l + shift)^2 - log pi / 10"""

        shift: float = 0.2
        item = "token"
        anchor = "old"

        def items(self, logp: Tensor, log_ratio: Tensor, batch: fa.Batch) -> Tensor:
            return (log_ratio + self.shift) ** 2 - logp / 10

    @dataclass(frozen=True)
    class MySequence(fa.Loss):
        """The square of the mean log-ratio, off the sequence's length / 10."""

        item = "sequence"
        anchor = "ref"
        rows = "pair"  # of which it learns both answers

        def items(self, logp: Tensor, log_ratio: Tensor, batch: fa.Batch) -> Tensor:
            return (batch.mean(log_ratio) - batch.lengths.to(logp.dtype) / 10) ** 2

    @dataclass(frozen=True)
    class MyPair(fa.Loss):
        beta: float = 0.5
        item = "pair"
        anchor = "ref"

        def items(self, logp: Tensor, log_ratio: Tensor, batch: fa.Batch) -> Tensor:
            total = batch.sum(log_ratio)
            margin = self.beta * (batch.chosen(total) - batch.rejected(total))
            return (1 - margin).relu() ** 2

    @dataclass(frozen=True)
    class MyBatch(fa.Loss):
        """Desirable sequences are to be 1 above the mean of the batch, the others 1 below it."""

        item = "batch"
        per = "sequence"
        anchor = "ref"

        def items(self, logp: Tensor, log_ratio: Tensor, batch: fa.Batch) -> Tensor:
            total, judged = batch.sum(log_ratio), batch.need("desirable", self.name)
            return (total - total.mean() - torch.where(judged, 1, -1)) ** 2

    @dataclass(frozen=True)
    class MyTokens(fa.Loss):
        """-A log pi, and the square of a token's distance from the mean of the batch."""

        item = "batch"
        per = "token"
        anchor = "old"

        def items(self, logp: Tensor, log_ratio: Tensor, batch: fa.Batch) -> Tensor:
            away = log_ratio - batch.token_mean(log_ratio)
            return away**2 - batch.token_advantage(self.name).to(logp.dtype) * logp

    @dataclass(frozen=True)
    class MyPreference(PairLoss):
        beta: float = 0.3

        def pair(self, chosen: Tensor, rejected: Tensor, batch: fa.Batch) -> Tensor:
            return (1 - self.beta * (chosen - rejected)) ** 2

    @dataclass(frozen=True)
    class MyPolicy(PolicyLoss):
        """-tanh(rho) A of the sequence's ratio, and all that a policy loss has."""

        coupled = "sequence"

        def surrogate(self, logp: Tensor, log_ratio: Tensor, advantage: Tensor, batch: fa.Batch) -> Tensor:
            return -batch.spread(batch.mean(log_ratio).exp().tanh()) * advantage


@pytest.fixture(autouse=True)
def own() -> Iterator[Losses]:
    """The classes by their names in the registry, which is put back afterwards."""
    before = dict(fa.Loss.registry)
    defined()
    yield {name: cls for name, cls in fa.Loss.registry.items() if name not in before}
    fa.Loss.registry.clear()
    fa.Loss.registry.update(before)


# ---- the same from dense logits --------------------------------------------------------------------------


def ratios(x: oracles.Tokens, anchor: str) -> list[Tensor]:
    """The (clipped) log-ratios of each sequence."""
    return [x.log_ratio(x.old_logp if anchor == "old" else x.ref_logp, s) for s in x.rows]


def halves(x: oracles.Tokens) -> tuple[Tensor, Tensor]:
    sums = torch.stack([r.sum() for r in ratios(x, "ref")])
    return sums[: len(sums) // 2], sums[len(sums) // 2 :]


def dense_token(x: oracles.Tokens) -> Tensor:
    return ((torch.cat(ratios(x, "old")) + 0.2) ** 2 - x.logp[x.mask] / 10).mean()


def dense_sequence(x: oracles.Tokens) -> Tensor:
    return torch.stack([(r.sum() / max(len(r), 1) - len(r) / 10) ** 2 for r in ratios(x, "ref")]).mean()


def dense_batch(x: oracles.Tokens) -> Tensor:
    sums = torch.cat(halves(x))
    goal = torch.tensor([1.0 if judged else -1.0 for judged in x.desirable.tolist()]).double()
    return ((sums - sums.mean() - goal) ** 2).mean()


def dense_tokens(x: oracles.Tokens) -> Tensor:
    ratio, advantage = torch.cat(ratios(x, "old")), x.advantage[:, None].expand(x.mask.shape)[x.mask]
    return (ratio - ratio.mean()).square().mean() - (advantage * x.logp[x.mask]).mean()


def dense_policy(x: oracles.Tokens) -> Tensor:
    found = [-r.mean().exp().tanh() * x.advantage[s] for s, r in enumerate(ratios(x, "old")) if len(r)]
    return torch.stack(found).sum() / len(x.rows)


DENSE: dict[str, Callable[[oracles.Tokens], Tensor]] = {
    "mytoken": dense_token,
    "mysequence": dense_sequence,
    "mypair": lambda x: ((1 - 0.5 * (halves(x)[0] - halves(x)[1])).relu() ** 2).mean(),
    "mybatch": dense_batch,
    "mytokens": dense_tokens,
    "mypreference": lambda x: ((1 - 0.3 * (halves(x)[0] - halves(x)[1])) ** 2).mean(),
    "mypolicy": dense_policy,
}
NAMES = list(DENSE)


def small(seed: int = 0) -> Case:
    head = make_head("all", 19, (6, 6))
    head.pop("softcap")  # more plans serve
    return make_case(LENGTHS, width=6, H=7, V=19, seed=seed, head=head)


def dense(
    case: Case, name: str, humanline: fa.Humanline | None = None, frozen: tuple[str, ...] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Value and gradients by autograd on dense logits."""
    leaves = leaves_of(case, frozen)
    at = case.with_operands(leaves)
    logp, _, _ = oracles.token_stats(at.hidden, at.weight, at.target, **at.head)
    bounds = None if humanline is None else (humanline.log_eps_p, humanline.log_eps_r)
    value = DENSE[name](oracles.Tokens(logp, case.mask, **case.columns, humanline=bounds))
    return value.detach(), gradients(value, leaves)


def same(got: tuple[Any, dict[str, Tensor]], want: tuple[Tensor, dict[str, Tensor]], what: str) -> None:
    check_loss(got[0].loss.detach(), want[0], F64)
    assert got[1].keys() == want[1].keys()
    for operand, grad in got[1].items():
        check_grad(grad, want[1][operand], F64, f"{what} {operand}")


def test_they_are_registered(own: Losses):
    assert {*own} == {*NAMES} and not {*NAMES} & {*REGISTRY}
    assert all(cls.__module__ == __name__ for cls in own.values())
    coupled = {name: (cls().item, cls.per, cls().unit) for name, cls in own.items()}
    assert coupled["mypair"] == ("pair", "pair", "pairs") == coupled["mypreference"]
    assert coupled["mysequence"] == ("sequence", "sequence", "sequences")
    assert coupled["mytokens"] == ("batch", "token", "tokens")
    assert coupled["mypolicy"] == ("sequence", "token", "sequences")


@pytest.mark.usefixtures("tiny_tiles")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("humanline", [None, HUMANLINE], ids=["", "humanline"])
def test_every_plan(own: Losses, name: str, humanline: fa.Humanline | None):
    case, loss = small(), own[name]()
    for frozen in ((), ("weight", "bias")):
        want = dense(case, name, humanline, frozen)
        calls: list[dict[str, Any]] = [{"plan": p} for p in plans_for(loss, frozen_head=bool(frozen))]
        for call in [*calls, {"backend": "eager"}, {"max_live": sum(LENGTHS)}, {"max_live": 30}]:
            same(run_loss(case, loss, frozen=frozen, humanline=humanline, **call), want, f"{call}")
    assert humanline is None or dense(case, name)[0] != want[0]
    early = {"token": "single", "sequence": "window", "pair": "window"}.get(loss.item)
    assert early is None or early in plans_for(loss)


@pytest.mark.parametrize("name", NAMES)
def test_float32_packed_and_scored(own: Losses, name: str):
    case, loss = small(1), own[name]()
    value, _ = dense(case, name)
    live = {k: v[case.mask] if v.shape == case.target.shape else v for k, v in case.columns.items()}
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    packed = fa.Batch(case.target[case.mask], cu_seqlens=offsets, **live)
    head = {**case.head, "temperature": case.head["temperature"][case.mask]}
    with torch.no_grad():
        out = fa.align_loss(case.hidden[case.mask], case.weight, packed, loss, **head)
    check_loss(out.loss, value, F64)
    out, _ = run_loss(case.to(torch.float32), loss)
    check_loss(out.loss.detach(), value, torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_sampled_humanline_keeps_the_value(own: Losses, name: str):
    case, clip = small(2), fa.HumanlineSampling(0.3, 0.4, torch.Generator().manual_seed(0))
    out, grads = run_loss(case, own[name](), humanline=clip)
    check_loss(out.loss.detach(), dense(case, name)[0], F64)
    assert out.metrics["humanline/unclipped"] < 1
    assert (grads["weight"] - dense(case, name)[1]["weight"]).norm() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_in_a_sum(own: Losses, name: str):
    """With a loss of the package, each with its own count; a sum in a sum is one."""
    case, other = small(3), fa.SFT()
    loss = fa.Sum([(0.5, other), (0.35, fa.Sum([(2.0, own[name]())]))])
    mine, theirs = dense(case, name), run_loss(case, other)
    value = 0.7 * mine[0] + 0.5 * theirs[0].loss.detach()
    grads = {k: 0.7 * mine[1][k] + 0.5 * theirs[1][k] for k in mine[1]}
    for plan in plans_for(loss):
        same(run_loss(case, loss, plan=plan), (value, grads), plan)


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(own: Losses, name: str):
    case = make_case([2, 1, 3, 1], width=3, H=3, V=6, seed=4)
    for humanline in (None, fa.Humanline(-3.0, 3.0)):

        def value(leaves: dict[str, Tensor], humanline: Any = humanline) -> Tensor:
            at = case.with_operands(leaves)
            return fa.align_loss(at.hidden, at.weight, at.batch(), own[name](), humanline=humanline).loss

        gradcheck(value, case.operands(), DIFFERENCE_STEP, DIFFERENCE)


@pytest.mark.parametrize("name", ["mytoken", "mysequence", "mypair", "mypreference", "mypolicy"])
def test_micro_batches_add_up(own: Losses, name: str):
    """Normalised by what the whole batch counts."""
    loss, case, total = own[name](), small(5), torch.zeros((), dtype=F64)
    count = loss.counts(case.batch().live())
    for rows in ([0, 3], [1, 2, 4, 5]):
        columns = {k: v[rows] if v.dim() and len(v) == 6 else v for k, v in case.columns.items()}
        columns["margin"] = columns["margin"][: len(rows) // 2]
        head = {**case.head, "temperature": case.head["temperature"][rows]}
        part = Case(case.hidden[rows], case.weight, case.target[rows], head, columns)
        total += run_loss(part, loss, normalizer=count)[0].loss.detach()
    check_loss(total, dense(case, name)[0], F64)


def test_a_pair_loss_reports_the_usual_metrics(own: Losses):
    case = small(6)
    out, _ = run_loss(case, own["mypreference"](beta=0.2))
    usual, _ = run_loss(case, fa.DPO(beta=0.2))
    assert {k: float(v) for k, v in out.metrics.items()} == {k: float(v) for k, v in usual.metrics.items()}


def test_a_policy_loss_has_the_shared_fields(own: Losses):
    """With a surrogate of 0 what is left of it is GRPO's."""
    case = small(7)
    case.columns["advantage"] = torch.zeros(6, dtype=F64)
    for shared in ({"beta": 0.3, "kl": "k2"}, {"entropy_coef": 0.2, "aggregation": "token_mean"}):
        mine, theirs = run_loss(case, own["mypolicy"](**shared)), run_loss(case, fa.GRPO(**shared))
        same(mine, (theirs[0].loss.detach(), theirs[1]), str(shared))
        assert mine[0].loss != 0
    with pytest.raises(ValueError, match=r'MyPolicy: kl must be "k1", "k2" or "k3"; got \'k4\''):
        own["mypolicy"](kl="k4")


# ---- the trainer -----------------------------------------------------------------------------------------

ROWS = dict.fromkeys(["mytoken", "mytokens", "mypolicy"], tiny.groups) | {"mybatch": tiny.judged}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("humanline", [None, True], ids=["", "humanline"])
def test_the_trainer_takes_it_by_its_name(own: Losses, tmp_path: Path, name: str, humanline: bool | None):
    rows = ROWS.get(name, tiny.pairs)()
    settings: dict[str, Any] = {"loss": name, "humanline": humanline, "gradient_accumulation_steps": 2}
    it = training.trainer(tmp_path, rows=rows, held_out=rows.select(range(3)), max_steps=3, **settings)
    before = training.weights(it.model)
    assert type(it.loss) is own[name] and (it.reference is None) == (humanline is None)
    it.train()
    assert len(training.logged(it)) == 3 and all(map(math.isfinite, training.logged(it)))
    assert math.isfinite(it.evaluate()["eval_loss"])
    after = training.weights(it.model)
    assert all(not torch.equal(after[key], value) for key, value in before.items())
    if humanline:  # the reference has followed
        assert training.logged(it, "humanline/unclipped")[0] == 1
        assert not torch.equal(it.reference.weights["model.norm.weight"], before["model.norm.weight"])


def test_the_trainer_takes_its_fields(own: Losses, tmp_path: Path):
    made = training.config(tmp_path, loss="mypair", loss_args={"beta": "0.25"})
    assert made.make_loss() == own["mypair"](beta=0.25)
    assert training.config(tmp_path, loss="mypair + 0.5*dpo").make_loss() == fa.Sum(
        [(1.0, own["mypair"]()), (0.5, fa.DPO())]
    )
    with pytest.raises(ValueError, match=r"MyPair has no field 'bta'; it has \['beta'\]. Did you mean"):
        training.config(tmp_path, loss="mypair", loss_args={"bta": 1})


# ---- what a class gets wrong -----------------------------------------------------------------------------

WRONG_CLASSES: dict[str, tuple[dict[str, Any], str]] = {
    "item": ({"item": "triple"}, r"Odd: item must be one of \['token'.*got item='triple'"),
    "item of another type": ({"item": ["pair"]}, r"Odd: item must be one of .*got item=\['pair'\]"),
    "anchor": ({"anchor": "initial"}, r'Odd: .*anchor "old", "ref" or None; got .*anchor=\'initial\''),
    "batch without per": ({"item": "batch"}, r'Odd: a loss with item="batch" must say .*add per = "token"'),
    "per": ({"item": "batch", "per": "triple"}, r"Odd: .*per.*'triple'"),
    "per coarser than item": ({"item": "sequence", "per": "pair"}, r"Odd: .*per.*'pair'"),
}


@pytest.mark.parametrize("wrong", WRONG_CLASSES)
def test_a_class_attribute_that_makes_no_sense(wrong: str):
    attributes, says = WRONG_CLASSES[wrong]
    with pytest.raises(TypeError, match=rf"(?s){says}"):
        type("Odd", (fa.Loss,), attributes)
    assert "odd" not in fa.Loss.registry


@pytest.mark.parametrize(
    ("name", "items", "expected", "got"),
    [
        ("mytoken", lambda x, batch: x[:-1], r"token.*\[15\]", r"\[14\]"),
        ("mysequence", lambda x, batch: x, r"sequence.*\[6\]", r"\[15\]"),
        ("mypair", lambda x, batch: batch.sum(x), r"pair.*\[3\]", r"\[6\]"),
        ("mybatch", lambda x, batch: x.mean(), r"sequence.*\[6\]", r"\[\]"),
        ("mytokens", lambda x, batch: x[:, None], r"token.*\[15\]", r"\[15, 1\]"),
    ],
)
def test_items_of_another_number(own: Losses, name: str, items: Any, expected: str, got: str):
    def wrong(self: Any, logp: Tensor, log_ratio: Tensor, batch: fa.Batch) -> Tensor:
        return items(log_ratio, batch)

    loss = type("Odd", (own[name],), {"items": wrong})()
    for plan in plans_for(loss):
        with pytest.raises(ValueError, match=rf"(?s)Odd.items: one number per {expected}; got {got}"):
            run_loss(small(), loss, plan=plan)


def test_what_is_missing_is_said(own: Losses):
    with pytest.raises(NotImplementedError, match=r"Odd must define items\(logp, log_ratio, batch\)"):
        run_loss(small(), type("Odd", (fa.Loss,), {})())
    with pytest.raises(NotImplementedError, match=r"Odd must define pair\("):
        run_loss(small(), type("Odd", (PairLoss,), {"beta": 0.1})())
    with pytest.raises(NotImplementedError, match=r"Odd must define surrogate"):
        run_loss(small(), type("Odd", (PolicyLoss,), {})())
    with pytest.raises(NotImplementedError, match=r"Odd reads .*must define plain\(\)"):
        type("Odd", (own["mytoken"],), {"reads": ("lse",)})().plain()


def test_a_shared_base_is_not_registered():
    class Shared(fa.Loss, base=True):
        pass

    class Mine(Shared):
        pass

    assert "shared" not in fa.Loss.registry and fa.Loss.registry["mine"] is Mine
