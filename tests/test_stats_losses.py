"""Losses that read more than log-probs (entropy, lse, mean logit), in every plan that can serve them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import Case, gradients, leaves_of, loss_id, make_case, make_head, oracle_loss, plans_for, run_loss
from tolerances import check_grad, check_like_torch, check_loss
from torch import Tensor

import fused_align as fa
import oracles

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
LENGTHS, WIDTH, V, H = [30, 41, 0, 17, 3, 45], 45, 600, 13
SMALL = {F64: 450_000, F32: 250_000, BF16: 450_000}  # several chunks of complete rows
SMOOTH, BOTH, BONUS = (
    fa.SFT(label_smoothing=0.2),
    fa.SFT(label_smoothing=0.1, z_loss=0.05),
    fa.GRPO(entropy_coef=0.3),
)
READERS = [SMOOTH, fa.SFT(z_loss=0.1), BOTH, BONUS, fa.PPO(entropy_coef=0.05, beta=0.1)]
HEADS = ["plain", "bias", "softcap", "logit_scale", "temperature", "per_token", "all"]


def some_case(head: str = "plain", scale: float = 1.0) -> Case:
    shape = len(LENGTHS), WIDTH
    return make_case(LENGTHS, width=WIDTH, H=H, V=V, scale=scale, head=make_head(head, V, shape))


def capped(case: Case) -> bool:
    return case.head.get("softcap") is not None


def calls(loss: fa.Loss, case: Case) -> Iterator[dict[str, Any]]:
    """Every plan that serves, with a trainable and a frozen head, with and without room."""
    for frozen in ((), ("weight", "bias")):
        for plan in plans_for(loss, bool(frozen), capped(case), case.hidden.dtype):
            for budget in (None, SMALL[case.hidden.dtype]):
                yield {"plan": plan, "frozen": frozen, "workspace_bytes": budget}


# --- what they are ---


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", [SMOOTH, fa.SFT(z_loss=0.1), BOTH], ids=loss_id)
def test_sft_is_torchs_cross_entropy(loss: fa.SFT, head: str):
    case = some_case(head)
    leaves = leaves_of(case)
    at = case.with_operands(leaves)
    z, target = oracles.logits(at.hidden, at.weight, **at.head)[case.mask], case.target[case.mask]
    want = F.cross_entropy(z, target, label_smoothing=loss.label_smoothing)
    want = want + loss.z_loss * z.logsumexp(-1).square().mean()
    want_grads = gradients(want, leaves)
    for call in calls(loss, case):
        out, grads = run_loss(case, loss, **call)
        check_loss(out.loss.detach(), want.detach(), F64)
        assert grads.keys() == want_grads.keys() - {*call["frozen"]}
        for name, grad in grads.items():
            check_grad(grad, want_grads[name], F64, f"{call} {name}")


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("coef", [0.3, -0.2])
def test_the_entropy_bonus_is_an_extra_term(coef: float, head: str):
    """And the metric says how much entropy there was, with and without a gradient."""
    case, loss = some_case(head), fa.GRPO(entropy_coef=coef, aggregation="token_mean")
    base, base_grads = run_loss(case, replace(loss, entropy_coef=0.0), backend="eager")
    leaves = leaves_of(case)
    at = case.with_operands(leaves)
    _, entropy, _ = oracles.token_stats(at.hidden, at.weight, at.target, **at.head)
    mean = entropy[case.mask].mean()
    term_grads = gradients(mean * coef, leaves)
    for call in calls(loss, case):
        out, grads = run_loss(case, loss, **call)
        check_loss(out.loss.detach(), base.loss.detach() - coef * mean.detach(), F64)
        check_loss(out.metrics["entropy"], mean.detach(), F64)
        for name, grad in grads.items():
            check_grad(grad, base_grads[name] - term_grads[name], F64, f"{call} {name}")
    assert "entropy" not in base.metrics
    with torch.no_grad():
        scored = fa.align_loss(case.hidden, case.weight, case.batch(), loss, **case.head)
    check_loss(scored.metrics["entropy"], mean.detach(), F64)


@pytest.mark.parametrize("loss", [SMOOTH, BONUS], ids=loss_id)
def test_under_a_softcap_only_recompute_serves(loss: fa.Loss):
    case = some_case("softcap")
    for plan, frozen in (("single", ()), ("single", ("weight",)), ("jacobian", ("weight",))):
        if plan == "jacobian" and loss is BONUS:
            continue
        with pytest.raises(ValueError, match=rf"(?s)plan='{plan}'.*softcap.*recompute"):
            run_loss(case, loss, plan=plan, frozen=frozen)
    with pytest.raises(ValueError, match=r"(?s)plan='jacobian'.*entropy.*recompute"):
        run_loss(some_case(), BONUS, plan="jacobian", frozen=("weight",))
    run_loss(case, fa.SFT(z_loss=0.1), plan="single")  # the lse is at hand


# --- in other dtypes and at the ends of the range ---


def like_torch(case: Case, loss: fa.Loss) -> None:
    """No worse than dense torch in the operands' dtype, by every plan."""
    low = case.hidden.dtype
    for call in calls(loss, case):
        want, want_grads = oracle_loss(case, loss, frozen=call["frozen"])
        plain, plain_grads = oracle_loss(case, loss, frozen=call["frozen"], dtype=low)
        out, grads = run_loss(case, loss, **call)
        assert out.loss.dtype == F32
        check_like_torch(out.loss.detach(), want.detach(), plain.detach(), F32, f"{call} loss")
        assert grads.keys() == want_grads.keys()
        for name, grad in grads.items():
            assert grad.dtype == case.operands()[name].dtype
            check_like_torch(grad, want_grads[name], plain_grads[name], F32, f"{call} {name}")


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("head", ["bias", "all"])
@pytest.mark.parametrize("loss", READERS, ids=loss_id)
def test_dtypes(loss: fa.Loss, head: str, dtype: torch.dtype):
    like_torch(some_case(head).to(dtype), loss)


def aimed(case: Case, kind: str) -> Case:
    """At every second position the target is certain, or `kind` nats behind another token."""
    y = case.target.clamp(min=0)
    if kind == "sure":
        case.hidden[:, ::2] = (600 * F.normalize(case.weight[y], dim=-1))[:, ::2]
    else:
        away = case.weight[(y + 1) % V] - case.weight[y]
        case.hidden[:, ::2] += (float(kind) * away / away.square().sum(-1, keepdim=True))[:, ::2]
    logp, _, _ = oracles.token_stats(case.hidden, case.weight, case.target)
    count = (logp[case.mask] > -1e-15 if kind == "sure" else logp[case.mask] < -float(kind) + 10).sum()
    assert count >= 20, "the case is no such case"
    case.columns |= {"old_logp": logp + 0.1, "ref_logp": logp - 0.1}
    return case


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("kind", ["sure", "90", "300"])
@pytest.mark.parametrize("loss", READERS, ids=loss_id)
def test_the_ends_of_the_range(loss: fa.Loss, kind: str, dtype: torch.dtype):
    case = aimed(some_case(), kind)
    if dtype == F32:
        like_torch(case.to(F32), loss)
        return
    for call in calls(loss, case):
        want, want_grads = oracle_loss(case, loss, frozen=call["frozen"])
        out, grads = run_loss(case, loss, **call)
        check_loss(out.loss.detach(), want.detach(), F64)
        for name, grad in grads.items():
            check_grad(grad, want_grads[name], F64, f"{call} {name}")


@pytest.mark.parametrize("head", ["plain", "all"])
@pytest.mark.usefixtures("tiny_tiles")
def test_tiny_tiles(head: str):
    small = make_case([3, 1, 0, 2], width=3, H=5, V=11, head=make_head(head, 11, (4, 3)))
    for loss in READERS:
        for frozen in ((), ("weight", "bias")):
            want, want_grads = oracle_loss(small, loss, frozen=frozen)
            for plan in plans_for(loss, frozen_head=bool(frozen), capped=capped(small)):
                out, grads = run_loss(small, loss, plan=plan, frozen=frozen)
                check_loss(out.loss.detach(), want.detach(), F64)
                for name, grad in grads.items():
                    check_grad(grad, want_grads[name], F64, f"{loss} {plan} {name}")


# --- a loss of one's own ---

STATS = ("entropy", "lse", "average")


@pytest.fixture
def own_losses() -> Iterator[dict[str, Any]]:
    before = dict(fa.Loss.registry)

    @dataclass(frozen=True)
    class OwnToken(fa.Loss):
        named: tuple[str, ...] = ()
        taken: tuple[str, ...] = ()

        @property
        def reads(self) -> tuple[str, ...]:
            return self.named

        def plain(self) -> fa.Loss:
            return replace(self, named=(), taken=())

        def each(self, logp: Tensor, batch: fa.Batch) -> Tensor:
            found = [(0.3 + k) * batch.stat(name, "Own").square() for k, name in enumerate(self.taken)]
            return sum(found, -logp)

        def items(self, logp: Tensor, log_ratio: Tensor, batch: fa.Batch) -> Tensor:
            return self.each(logp, batch)

    @dataclass(frozen=True)
    class OwnSequence(OwnToken):
        item = "sequence"

        def items(self, logp: Tensor, log_ratio: Tensor, batch: fa.Batch) -> Tensor:
            return batch.sum(self.each(logp, batch)).tanh()

    yield {"token": OwnToken, "sequence": OwnSequence}
    fa.Loss.registry.clear()
    fa.Loss.registry.update(before)


def dense_own(case: Case, item: str, taken: tuple[str, ...]) -> Tensor:
    z = oracles.live_logits(case.hidden, case.weight, case.mask, **case.head)
    logp, entropy, lse = oracles.token_stats(case.hidden, case.weight, case.target, **case.head)
    stats = {"entropy": entropy, "lse": lse, "average": z.mean(-1)}
    each = -logp + sum(((0.3 + k) * stats[name] ** 2 for k, name in enumerate(taken)), torch.zeros(()))
    each = torch.where(case.mask, each, 0)
    return each.sum() / case.mask.sum() if item == "token" else each.sum(-1).tanh().mean()


@pytest.mark.parametrize("head", ["bias", "all"])
@pytest.mark.parametrize("taken", [("entropy",), ("lse",), ("average",), STATS], ids=str)
@pytest.mark.parametrize("item", ["token", "sequence"])
def test_a_loss_of_ones_own(own_losses: dict[str, Any], item: str, taken: tuple[str, ...], head: str):
    loss, case = own_losses[item](taken, taken), some_case(head)
    case.hidden = case.hidden / 4
    leaves = leaves_of(case)
    want = dense_own(case.with_operands(leaves), item, taken)
    want_grads = gradients(want, leaves)
    for call in calls(loss, case):
        out, grads = run_loss(case, loss, **call)
        check_loss(out.loss.detach(), want.detach(), F64)
        assert ("entropy" in out.metrics) == ("entropy" in taken)
        for name, grad in grads.items():
            check_grad(grad, want_grads[name], F64, f"{call} {name}")


@pytest.mark.parametrize("missing", STATS)
@pytest.mark.parametrize("item", ["token", "sequence"])
def test_a_statistic_that_was_not_named(own_losses: dict[str, Any], item: str, missing: str):
    named = tuple(name for name in STATS if name != missing)
    loss, case = own_losses[item](named, STATS), some_case()
    for call in [{"plan": plan} for plan in plans_for(loss)] + [{"backend": "eager"}]:
        with pytest.raises(ValueError, match=rf"(?s)Own takes '{missing}'.*reads.*add it there"):
            run_loss(case, loss, **call)
