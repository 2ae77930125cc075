"""Batch: what it counts, and that padded, packed and labelled layouts mean the same."""

from __future__ import annotations

import pytest
import torch
from cases import SELECTED, Case, fresh, loss_id, make_case, randn, run_loss

import fused_align as fa

X = -100


def test_counts():
    batch = fa.Batch(torch.tensor([[1, X, 2], [X, X, X], [X, 3, X], [4, 5, 6]]))
    assert batch.lengths.tolist() == [2, 0, 1, 3]
    assert (batch.count("tokens"), batch.count("sequences"), batch.count("pairs")) == (6, 4, 2)
    assert all(isinstance(batch.count(unit), int) for unit in ("tokens", "sequences", "pairs"))


def test_counts_packed():
    batch = fa.Batch(
        torch.tensor([1, X, 2, 3, X]), cu_seqlens=torch.tensor([0, 3, 3, 4, 5], dtype=torch.int32)
    )
    assert batch.lengths.tolist() == [2, 0, 1, 0]
    assert (batch.count("tokens"), batch.count("sequences"), batch.count("pairs")) == (3, 4, 2)


def test_labels_are_shifted_left():
    labels = torch.tensor([[X, X, 7, 8, 9], [5, X, 6, X, X]])
    before = labels.clone()
    batch = fa.Batch.from_labels(labels, advantage=torch.ones(2))
    assert batch.target.tolist() == [[X, 7, 8, 9, X], [X, 6, X, X, X]]
    assert batch.lengths.tolist() == [3, 1]
    assert torch.equal(labels, before)
    assert batch.advantage is not None and torch.equal(batch.advantage, torch.ones(2))
    assert fa.Batch.from_labels(torch.zeros(2, 0, dtype=torch.int64)).target.shape == (2, 0)


def test_labels_give_the_models_own_loss():
    """SFT from labels is the mean cross-entropy of logits[:, :-1] against labels[:, 1:]."""
    hidden, weight = randn(2, 5, 4, seed=1), randn(9, 4, seed=2)
    labels = torch.tensor([[X, X, 7, 8, 1], [5, X, 6, X, X]])
    want = torch.nn.functional.cross_entropy(
        (hidden @ weight.T)[:, :-1].reshape(-1, 9), labels[:, 1:].reshape(-1)
    )
    out = fa.align_loss(hidden, weight, fa.Batch.from_labels(labels), fa.SFT())
    torch.testing.assert_close(out.loss, want, rtol=1e-12, atol=0)


def test_advantage_per_token_iff_it_has_targets_shape():
    """A square batch is no reason to guess: [S] is per sequence, [S, T] per token."""
    case = make_case([3, 2, 3], width=3, H=4, V=9)
    per_sequence = case.columns["advantage"]
    spread = per_sequence[:, None].expand(3, 3).contiguous()
    one, _ = run_loss(case, fa.GRPO())
    other, _ = run_loss(case, fa.GRPO(), changes={"advantage": spread})
    torch.testing.assert_close(one.loss, other.loss, rtol=1e-12, atol=0)


def test_advantage_of_a_packed_batch():
    """[N] is per token, [S] per sequence."""
    packed = pack(make_case([3, 1], width=3, H=4, V=9))
    hidden, weight, target, columns = packed
    by_sequence = fa.align_loss(hidden, weight, fa.Batch(target, **columns), fa.PPO()).loss
    columns["advantage"] = columns["advantage"].repeat_interleave(torch.tensor([3, 1]))
    by_token = fa.align_loss(hidden, weight, fa.Batch(target, **columns), fa.PPO()).loss
    torch.testing.assert_close(by_sequence, by_token, rtol=1e-12, atol=0)


def pack(case: Case, keep_ignored: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, dict]:
    """hidden [N, H], weight, target [N], columns with cu_seqlens: the live tokens, or all of them."""
    kept = torch.ones_like(case.mask) if keep_ignored else case.mask
    offsets = torch.cat([torch.zeros(1), kept.sum(1).cumsum(0)]).int()
    columns = {k: v[kept] if v.shape == case.target.shape else v for k, v in case.columns.items()}
    return case.hidden[kept], case.weight, case.target[kept], {**columns, "cu_seqlens": offsets}


@pytest.mark.parametrize("loss", SELECTED, ids=loss_id)
@pytest.mark.parametrize("keep_ignored", [False, True])
def test_packed_is_padded(loss: fa.Loss, keep_ignored: bool):
    case = make_case([3, 1, 0, 5, 2, 4], width=6, H=7, V=19, seed=3)
    case.columns["token_weight"] = randn(6, 6, seed=4).abs()
    want, want_grads = run_loss(case, loss)
    hidden, weight, target, columns = pack(case, keep_ignored)
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    out = fa.align_loss(hidden, weight, fa.Batch(target, **columns), fresh(loss))
    out.loss.backward()
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-12, atol=1e-14)
    for name, metric in want.metrics.items():
        torch.testing.assert_close(out.metrics[name], metric, rtol=1e-9, atol=1e-12)
    kept = torch.ones_like(case.mask) if keep_ignored else case.mask
    torch.testing.assert_close(hidden.grad, want_grads["hidden"][kept], rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(weight.grad, want_grads["weight"], rtol=1e-9, atol=1e-13)


def test_the_callers_tensors_are_left_alone():
    case = make_case([3, 1, 0, 5], width=6, H=7, V=19)
    kept = {name: tensor.clone() for name, tensor in case.columns.items()}
    target, hidden, weight = case.target.clone(), case.hidden.clone(), case.weight.clone()
    for loss in SELECTED:
        run_loss(case, loss)
    assert (
        torch.equal(case.target, target)
        and torch.equal(case.hidden, hidden)
        and torch.equal(case.weight, weight)
    )
    for name, tensor in kept.items():
        assert torch.equal(case.columns[name], tensor), name


def test_no_gradient_flows_into_the_columns():
    case = make_case([3, 1, 2, 5], width=6, H=7, V=19)
    case.columns["token_weight"] = randn(4, 6, seed=4).abs()
    for column in case.columns.values():
        column.requires_grad_(column.is_floating_point())
    for loss in SELECTED:
        run_loss(case, loss)
        run_loss(case, loss, plan="recompute")
    assert all(column.grad is None for column in case.columns.values())
