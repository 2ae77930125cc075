"""What must hold for any batch: Hypothesis draws the lengths, the sizes and the seeds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import HUMANLINE, SELECTED, Case, fresh, loss_id, make_case, plans_for, run_loss
from hypothesis import assume, given
from hypothesis import strategies as st
from tolerances import check_grad, check_loss
from torch import Tensor

import fused_align as fa

WIDTH = 5
SPLIT = [loss for loss in SELECTED if loss.item != "batch"]  # the others compare all of a batch
ANCHORED = [loss for loss in SELECTED if loss.anchor is not None]

lengths = st.lists(st.integers(0, WIDTH), min_size=1, max_size=4)  # per pair or two sequences: doubled below
seeds = st.integers(0, 10**6)


def draw(counts: list[int], seed: int) -> Case:
    """An even number of sequences, so that every loss can read them."""
    return make_case([*counts, *reversed(counts)], width=WIDTH, H=4, V=13, seed=seed)


def sequences(case: Case, index: list[int]) -> Case:
    """Some sequences, in the given order."""
    S = case.target.shape[0]
    columns = {k: v[index] if v.dim() and v.shape[0] == S else v for k, v in case.columns.items()}
    pairs = [i for i in index if i < S // 2]
    if len(index) == 2 * len(pairs):
        columns["margin"] = case.columns["margin"][pairs]
    else:  # not of whole pairs
        del columns["margin"]
    return Case(case.hidden[index], case.weight, case.target[index], case.head, columns)


def items_of(loss: fa.Loss, case: Case) -> list[list[int]]:
    """The sequences of each item of the loss: pairs, and GRAO's groups, stay together."""
    S = case.target.shape[0]
    if "pair" in (loss.item, loss.per):
        return [[i, i + S // 2] for i in range(S // 2)]
    if isinstance(loss, fa.GRAO):
        groups = case.columns["group"].tolist()
        return [[i for i in range(S) if groups[i] == group] for group in sorted(set(groups))]
    return [[i] for i in range(S)]


def joined(parts: list[list[int]]) -> list[int]:
    """Items in one batch: all first sequences, then all second ones."""
    return [part[place] for place in range(max(map(len, parts))) for part in parts if place < len(part)]


def same(
    got: tuple[fa.AlignOutput, dict[str, Tensor]], want: tuple[fa.AlignOutput, dict[str, Tensor]]
) -> None:
    check_loss(got[0].loss.detach(), want[0].loss.detach(), torch.float64)
    for name, grad in want[1].items():
        check_grad(got[1][name], grad, torch.float64, name)


@pytest.mark.parametrize("loss", SPLIT, ids=loss_id)
@given(counts=lengths, seed=seeds, data=st.data())
def test_micro_batches_add_up(loss: fa.Loss, counts: list[int], seed: int, data: st.DataObject):
    """With the count of the whole batch as normalizer, any split of its items gives the same sum."""
    case = draw(counts, seed)
    options: dict[str, Any] = {"humanline": HUMANLINE if loss.anchor else None}
    counts = loss.counts(case.batch().live())
    options["normalizer"] = {unit: max(int(count), 1) for unit, count in counts.items()}
    whole, whole_grads = run_loss(case, loss, **options)
    items = items_of(loss, case)
    where = data.draw(st.lists(st.integers(0, 2), min_size=len(items), max_size=len(items)))
    total = torch.zeros((), dtype=torch.float64)
    weight_grad = torch.zeros_like(case.weight)
    for part in range(3):
        mine = [item for item, place in zip(items, where, strict=True) if place == part]
        if mine:
            index = joined(mine)
            out, grads = run_loss(sequences(case, index), loss, **options)
            total += out.loss.detach()
            weight_grad += grads["weight"]
            got, want = grads["hidden"], whole_grads["hidden"][index]
            # terms that cancel, as APO-down's where the rejected answer is empty, may leave a rounding
            if max(got.abs().max(), want.abs().max()) > 1e-15:
                check_grad(got, want, torch.float64, "hidden")
    check_loss(total, whole.loss.detach(), torch.float64)
    if max(weight_grad.abs().max(), whole_grads["weight"].abs().max()) > 1e-15:
        check_grad(weight_grad, whole_grads["weight"], torch.float64, "weight")


@pytest.mark.parametrize(
    "loss", [loss for loss in SELECTED if not isinstance(loss, fa.BetaDPO)], ids=loss_id
)  # BetaDPO draws pairs by their places
@given(counts=lengths, seed=seeds, data=st.data())
def test_the_order_of_the_items_does_not_matter(
    loss: fa.Loss, counts: list[int], seed: int, data: st.DataObject
):
    case = draw(counts, seed)
    index = joined(data.draw(st.permutations(items_of(loss, case))))
    out, grads = run_loss(case, loss)
    moved, moved_grads = run_loss(sequences(case, index), loss)
    same((moved, moved_grads), (out, {"hidden": grads["hidden"][index], "weight": grads["weight"]}))


@pytest.mark.parametrize("loss", SELECTED, ids=loss_id)
@given(counts=lengths, seed=seeds)
def test_packed_is_padded(loss: fa.Loss, counts: list[int], seed: int):
    case = draw(counts, seed)
    assume(
        case.mask.sum() != case.target.shape[0]
    )  # else [S] is target's shape, and means one advantage per token
    columns = {k: v[case.mask] if v.shape == case.target.shape else v for k, v in case.columns.items()}
    offsets = torch.cat([torch.zeros(1), case.mask.sum(1).cumsum(0)]).int()
    hidden = case.hidden[case.mask].requires_grad_()
    weight = case.weight.clone().requires_grad_()
    batch = fa.Batch(case.target[case.mask], **columns, cu_seqlens=offsets)
    out = fa.align_loss(hidden, weight, batch, fresh(loss))
    out.loss.backward()
    assert hidden.grad is not None and weight.grad is not None
    want, grads = run_loss(case, loss)
    same(
        (out, {"hidden": hidden.grad, "weight": weight.grad}),
        (want, {"hidden": grads["hidden"][case.mask], "weight": grads["weight"]}),
    )


@pytest.mark.parametrize("loss", SELECTED, ids=loss_id)
@given(counts=lengths, seed=seeds, padding=st.integers(1, 3))
def test_more_padding_changes_nothing(loss: fa.Loss, counts: list[int], seed: int, padding: int):
    case = draw(counts, seed)
    S = case.target.shape[0]

    def wider(x: Tensor, fill: float) -> Tensor:
        return torch.cat([x, torch.full((S, padding, *x.shape[2:]), fill, dtype=x.dtype)], 1)

    nan = float("nan")
    columns = {k: wider(v, nan) if v.shape == case.target.shape else v for k, v in case.columns.items()}
    wide = Case(wider(case.hidden, nan), case.weight, wider(case.target, -100), {}, columns)
    got, grads = run_loss(wide, loss)
    want, want_grads = run_loss(case, loss)
    same((got, {"hidden": grads["hidden"][:, :WIDTH], "weight": grads["weight"]}), (want, want_grads))


@pytest.mark.parametrize("loss", ANCHORED, ids=loss_id)
@given(counts=lengths, seed=seeds)
def test_infinite_humanline_bounds_are_off(loss: fa.Loss, counts: list[int], seed: int):
    case = draw(counts, seed)
    infinite = fa.Humanline(float("-inf"), float("inf"))
    off, off_grads = run_loss(case, loss)
    wide, wide_grads = run_loss(case, loss, humanline=infinite)
    assert torch.equal(off.loss, wide.loss)
    assert all(torch.equal(grad, wide_grads[name]) for name, grad in off_grads.items())


@pytest.mark.parametrize("loss", SELECTED, ids=loss_id)
@given(counts=lengths, seed=seeds)
def test_token_weights_of_one_are_none(loss: fa.Loss, counts: list[int], seed: int):
    case = draw(counts, seed)
    ones = torch.ones(case.target.shape, dtype=torch.float64)
    same(run_loss(case, loss, changes={"token_weight": ones}), run_loss(case, loss))


def plain_sums(loss: fa.Loss) -> bool:
    """Whether its items are sums over tokens alone, so that a weight of 0 is as good as a mask."""
    means = (fa.GSPO, fa.GMPO, fa.GRAO, fa.Sum, fa.SigmoidNorm, fa.SimPO, fa.CPO, fa.ORPO)
    counts = getattr(loss, "normalize", False) or getattr(loss, "ld_alpha", 1) != 1
    by_length = "mean_token_mean" in getattr(loss, "aggregation", "")
    return not (isinstance(loss, means) or counts or by_length or loss.item == "batch")


@pytest.mark.parametrize("loss", list(filter(plain_sums, SELECTED)), ids=loss_id)
@given(counts=lengths, seed=seeds, data=st.data())
def test_a_weight_of_zero_is_a_mask(loss: fa.Loss, counts: list[int], seed: int, data: st.DataObject):
    """For the sums: counts stay those of live tokens, hence the given normalizer."""
    case = draw(counts, seed)
    kept = torch.tensor(
        data.draw(st.lists(st.booleans(), min_size=case.target.numel(), max_size=case.target.numel()))
    )
    kept = kept.view(case.target.shape)
    weighted = run_loss(case, loss, changes={"token_weight": kept.double()}, normalizer=7)
    masked = run_loss(replace(case, target=case.target.where(kept, torch.tensor(-100))), loss, normalizer=7)
    same(weighted, masked)


@pytest.mark.parametrize("beta", [0.1, 1.0])
@given(counts=lengths, seed=seeds)
def test_swapping_chosen_and_rejected_flips_the_margin(beta: float, counts: list[int], seed: int):
    case = draw(counts, seed)
    half = len(counts)
    swapped = sequences(case, [*range(half, 2 * half), *range(half)])
    out, _ = run_loss(case, fa.DPO(beta=beta))
    other, _ = run_loss(swapped, fa.DPO(beta=beta))
    margin = out.metrics["rewards/margins"]
    torch.testing.assert_close(other.metrics["rewards/margins"], -margin, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(other.metrics["rewards/chosen"], out.metrics["rewards/rejected"])
    # -log s(-x) = -log s(x) + x
    check_loss(other.loss.detach(), (out.loss + margin).detach(), torch.float64)
    ties = sum(length == 0 and again == 0 for length, again in zip(counts, reversed(counts), strict=True))
    share = float(out.metrics["rewards/accuracies"] + other.metrics["rewards/accuracies"])
    assert share == pytest.approx(1 - ties / half)


@pytest.mark.parametrize("loss", SELECTED, ids=loss_id)
@given(counts=lengths, seed=seeds)
def test_the_plan_does_not_matter(loss: fa.Loss, counts: list[int], seed: int):
    case = draw(counts, seed)
    humanline = HUMANLINE if loss.anchor else None
    first, *others = plans_for(loss)
    want = run_loss(case, loss, plan=first, humanline=humanline)
    for plan in others:
        same(run_loss(case, loss, plan=plan, humanline=humanline), want)
    for plan in plans_for(loss, frozen_head=True):
        frozen = run_loss(case, loss, plan=plan, humanline=humanline, frozen=("weight",))
        same(frozen, (want[0], {"hidden": want[1]["hidden"]}))


@given(counts=lengths, seed=seeds, shift=st.floats(-50, 50))
def test_a_constant_added_to_all_logits_changes_nothing(counts: list[int], seed: int, shift: float):
    case = draw(counts, seed)
    want = fa.linear_logp(case.hidden, case.weight, case.target)
    bias = torch.full((13,), shift, dtype=torch.float64)
    got = fa.linear_logp(case.hidden, case.weight, case.target, bias=bias)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


@given(counts=lengths, seed=seeds, data=st.data())
def test_the_order_of_the_vocabulary_does_not_matter(counts: list[int], seed: int, data: st.DataObject):
    case = draw(counts, seed)
    order = torch.tensor(data.draw(st.permutations(range(13))))
    want = fa.linear_logp(case.hidden, case.weight, case.target)
    places = order.argsort()
    moved = torch.where(case.mask, places[case.target.clamp(min=0)], -100)
    got = fa.linear_logp(case.hidden, case.weight[order], moved)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
