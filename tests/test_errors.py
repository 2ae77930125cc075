"""Bad input gets a sentence: what was got, what was expected. Each pattern holds both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Case, make_case, run_loss

import fused_align as fa

WIDTH, H, V = 6, 8, 30


def small() -> Case:
    return make_case([3, 1, 0, 5], width=WIDTH, H=H, V=V).to(torch.float32)


def says(*parts: str) -> str:
    """A pattern for a message that holds all parts, in any order."""
    return "(?s)" + "".join(f"(?=.*{part})" for part in parts)


def shape(*sizes: int) -> str:
    return r"\[" + ", ".join(map(str, sizes)) + r"\]"


def logp(case: Case, **changes: Any) -> torch.Tensor:
    given = {"hidden": case.hidden, "weight": case.weight, "target": case.target, **changes}
    return fa.linear_logp(given.pop("hidden"), given.pop("weight"), given.pop("target"), **given)


def stats(case: Case, **changes: Any) -> fa.TokenStats:
    given = {"hidden": case.hidden, "weight": case.weight, "target": case.target, **changes}
    return fa.token_stats(given.pop("hidden"), given.pop("weight"), given.pop("target"), **given)


def loss(case: Case, **changes: Any) -> fa.AlignOutput:
    given = {"hidden": case.hidden, "weight": case.weight, **changes}
    batch = fa.Batch(given.pop("target", case.target), **case.columns)
    return fa.align_loss(
        given.pop("hidden"), given.pop("weight"), batch, given.pop("loss", fa.DPO()), **given
    )


HEAD_ERRORS: dict[str, tuple[Callable[[], dict[str, Any]], type[Exception], str]] = {
    "transposed weight": (
        lambda: {"weight": torch.zeros(H, V)},
        ValueError,
        says("weight", "H=8", shape(4, 6, 8), shape(8, 30), r"weight\.T"),
    ),
    "weight of another size": (
        lambda: {"weight": torch.zeros(V, H + 1)},
        ValueError,
        says("weight", "H=8", shape(30, 9)),
    ),
    "weight with three dimensions": (
        lambda: {"weight": torch.zeros(V, H, 1)},
        ValueError,
        says("weight", shape(30, 8, 1)),
    ),
    "weight of integers": (
        lambda: {"weight": torch.zeros(V, H, dtype=torch.int64)},
        TypeError,
        says("weight", "float32", "int64"),
    ),
    "hidden of integers": (
        lambda: {"hidden": torch.zeros(4, WIDTH, H, dtype=torch.int32)},
        TypeError,
        says("hidden", "float32", "int32"),
    ),
    "bias of another size": (
        lambda: {"bias": torch.zeros(V + 1)},
        ValueError,
        says("bias", shape(30), shape(31)),
    ),
    "bias of integers": (
        lambda: {"bias": torch.zeros(V, dtype=torch.int64)},
        TypeError,
        says("bias", "float32", "int64"),
    ),
    "temperature of another shape": (
        lambda: {"temperature": torch.ones(WIDTH)},
        ValueError,
        says("temperature", shape(4, 6), shape(6)),
    ),
    "temperature of zero": (
        lambda: {"temperature": 0.0},
        ValueError,
        says("temperature", "positive", r"0\.0"),
    ),
    "negative temperature": (
        lambda: {"temperature": -1.0},
        ValueError,
        says("temperature", "positive", r"-1\.0"),
    ),
    "softcap of zero": (lambda: {"softcap": 0.0}, ValueError, says("softcap", "positive", r"0\.0")),
    "target of floats": (
        lambda: {"target": torch.zeros(4, WIDTH)},
        TypeError,
        says("target", "int64", "float32"),
    ),
    "target of int32": (
        lambda: {"target": torch.zeros(4, WIDTH, dtype=torch.int32)},
        TypeError,
        says("target", "int64", "int32"),
    ),
    "target out of range": (
        lambda: {"target": torch.full((4, WIDTH), V)},
        ValueError,
        says("target", r"\[0, 30\)", "got 30"),
    ),
    "negative target": (
        lambda: {"target": torch.full((4, WIDTH), -2)},
        ValueError,
        says("target", r"\[0, 30\)", "got -2"),
    ),
    "a tensor for logit_scale": (
        lambda: {"logit_scale": torch.tensor(2.0)},
        TypeError,
        says("logit_scale", "number", "tensor"),
    ),
    "a list for bias": (lambda: {"bias": [0.0] * V}, TypeError, says("bias", "Tensor", "list")),
    "no such backend": (
        lambda: {"backend": "triton3"},
        ValueError,
        says("backend", "torch", "eager", "triton3"),
    ),
    "no such plan": (lambda: {"plan": "fast"}, ValueError, says("plan", "jacobian", "recompute", "fast")),
    "no such precision": (lambda: {"precision": "low"}, ValueError, says("precision", "high", "bf16", "low")),
    "budget of zero": (lambda: {"workspace_bytes": 0}, ValueError, says("workspace_bytes", "positive", "0")),
    "negative budget": (
        lambda: {"workspace_bytes": -5},
        ValueError,
        says("workspace_bytes", "positive", "-5"),
    ),
}


@pytest.mark.parametrize("what", HEAD_ERRORS)
@pytest.mark.parametrize("call", [logp, stats, loss], ids=["linear_logp", "token_stats", "align_loss"])
def test_head(call: Callable[..., object], what: str):
    changes, kind, message = HEAD_ERRORS[what]
    with pytest.raises(kind, match=message):
        call(small(), **changes())


@pytest.mark.parametrize("call", [logp, stats, loss], ids=["linear_logp", "token_stats", "align_loss"])
def test_head_names_the_function_that_was_called(call: Callable[..., object]):
    name = {logp: "linear_logp", stats: "token_stats", loss: "align_loss"}[call]
    with pytest.raises(ValueError, match=rf"^{name}: "):
        call(small(), weight=torch.zeros(H, V))


@pytest.mark.parametrize("call", [logp, stats], ids=["linear_logp", "token_stats"])
def test_target_that_does_not_match_hidden(call: Callable[..., object]):
    with pytest.raises(ValueError, match=says("target", shape(4, 6), shape(4, 5))):
        call(small(), target=torch.zeros(4, 5, dtype=torch.int64))


def test_batch_that_does_not_match_hidden():
    case = small()
    with pytest.raises(ValueError, match=says("target", shape(4, 6), shape(4, 5))):
        fa.align_loss(case.hidden, case.weight, fa.Batch(torch.zeros(4, 5, dtype=torch.int64)), fa.SFT())
    with pytest.raises(ValueError, match=says("target", shape(24), shape(4, 6))):
        fa.align_loss(case.hidden.flatten(0, 1), case.weight, case.batch(), fa.SFT())


def test_hidden_without_dimensions():
    with pytest.raises(ValueError, match=says("hidden", "weight")):
        fa.linear_logp(torch.tensor(1.0), torch.zeros(V, H), torch.tensor(1))


def test_logp_from_logits():
    logits, target = torch.zeros(4, V), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match=says("target", shape(4, 30), shape(5))):
        fa.logp_from_logits(logits, torch.zeros(5, dtype=torch.int64))
    with pytest.raises(TypeError, match=says("target", "int64", "int32")):
        fa.logp_from_logits(logits, target.int())
    with pytest.raises(TypeError, match=says("logits", "int64")):
        fa.logp_from_logits(logits.long(), target)
    with pytest.raises(ValueError, match=says("target", r"\[0, 30\)", "got 30")):
        fa.logp_from_logits(logits, target + V)
    with pytest.raises(ValueError, match=says("temperature", "positive")):
        fa.logp_from_logits(logits, target, temperature=0.0)
    with pytest.raises(ValueError, match=says("temperature", shape(4), shape(3))):
        fa.logp_from_logits(logits, target, temperature=torch.ones(3))


# --- losses and their batches ---


@pytest.mark.parametrize("which", [fa.DPO(), fa.IPO(), fa.KTO()], ids=lambda x: x.name)
def test_a_missing_reference(which: fa.Loss):
    with pytest.raises(ValueError, match=says(which.name, "ref_logp", "None")):
        run_loss(small(), which, changes={"ref_logp": None})


@pytest.mark.parametrize("name", ["kl", "desirable"])
def test_kto_needs(name: str):
    with pytest.raises(ValueError, match=says("KTO", name, "None")):
        run_loss(small(), fa.KTO(), changes={name: None})


@pytest.mark.parametrize("which", [fa.GRPO(), fa.PPO()], ids=lambda x: x.name)
def test_policy_losses_need_an_advantage(which: fa.Loss):
    with pytest.raises(ValueError, match=says(which.name, "advantage", "None")):
        run_loss(small(), which, changes={"advantage": None})


def test_a_kl_penalty_needs_a_reference():
    with pytest.raises(ValueError, match=says("GRPO", "KL", "ref_logp", "None")):
        run_loss(small(), fa.GRPO(beta=0.1), changes={"ref_logp": None})


def test_pairs_need_an_even_number():
    case = make_case([3, 1, 2], width=4, H=H, V=V).to(torch.float32)
    with pytest.raises(ValueError, match=says("even", "3")):
        run_loss(case, fa.DPO())


def test_humanline_needs_a_ratio():
    with pytest.raises(ValueError, match=says("Humanline", "SFT", "log-ratio")):
        run_loss(small(), fa.SFT(), humanline=fa.Humanline())


def test_normalizer():
    with pytest.raises(ValueError, match=says("normalizer", "positive", "pairs", "0")):
        run_loss(small(), fa.DPO(), normalizer=0)
    with pytest.raises(ValueError, match=says("normalizer", "pairs", "tokens")):
        run_loss(small(), fa.DPO(), normalizer={"tokens": 3})
    with pytest.raises(ValueError, match=says("normalizer", "positive", "-3")):
        run_loss(small(), fa.DPO(), normalizer=torch.tensor(-3.0))
    with pytest.raises(ValueError, match=says("normalizer", shape(2))):
        run_loss(small(), fa.DPO(), normalizer=torch.ones(2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fa.GRPO(aggregation="mean"), says("aggregation", "token_mean", "'mean'")),
        (lambda: fa.GRPO(aggregation="constant"), says("max_length", "None")),
        (lambda: fa.GRPO(kl="k4"), says("kl", "k1", "k2", "k3", "k4")),
        (lambda: fa.GRPO(delta=1.1), says("delta", r"1\.2", r"1\.1")),
        (lambda: fa.DPO(label_smoothing=0.7), says("label_smoothing", r"0\.5", r"0\.7")),
        (lambda: fa.DPO(label_smoothing=-0.1), says("label_smoothing", r"-0\.1")),
        (lambda: fa.IPO(tau=0.0), says("tau", "positive", r"0\.0")),
        (lambda: fa.Humanline(1.0, -1.0), says("log_eps_p", "log_eps_r", r"1\.0", r"-1\.0")),
        (lambda: fa.SyncSchedule(every=0), says("every", "1", "0")),
    ],
)
def test_options(make: Callable[[], object], message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_loss_that_is_no_loss():
    with pytest.raises(TypeError, match=says("loss", "Loss", "str")):
        fa.align_loss(small().hidden, small().weight, small().batch(), "dpo")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=says("loss", "Loss", "DPO")):
        fa.align_loss(small().hidden, small().weight, small().batch(), fa.DPO)  # type: ignore[arg-type]


def test_a_batch_that_is_no_batch():
    with pytest.raises(TypeError, match=says("batch", "Batch", "Tensor")):
        fa.align_loss(small().hidden, small().weight, small().target, fa.SFT())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "value", "kind", "message"),
    [
        ("old_logp", torch.zeros(4, 5), ValueError, says("old_logp", shape(4, 6), shape(4, 5))),
        ("ref_logp", torch.zeros(24), ValueError, says("ref_logp", shape(4, 6), shape(24))),
        ("sampler_logp", torch.zeros(4), ValueError, says("sampler_logp", shape(4, 6), shape(4))),
        ("token_weight", torch.zeros(6, 4), ValueError, says("token_weight", shape(4, 6), shape(6, 4))),
        ("advantage", torch.zeros(6), ValueError, says("advantage", shape(4), shape(6))),
        ("margin", torch.zeros(4), ValueError, says("margin", shape(2), shape(4))),
        ("desirable", torch.zeros(4), TypeError, says("desirable", "bool", "float32")),
        ("desirable", torch.zeros(2, dtype=torch.bool), ValueError, says("desirable", shape(4), shape(2))),
        ("off_policy", torch.zeros(4, dtype=torch.int64), TypeError, says("off_policy", "bool", "int64")),
        ("group", torch.zeros(5, dtype=torch.int64), ValueError, says("group", shape(4), shape(5))),
        ("kl", torch.zeros(1), ValueError, says("kl", r"\[\]", shape(1))),
        ("kl", 0.3, TypeError, says("kl", "Tensor", "float")),
        ("ref_logp", [[0.0]], TypeError, says("ref_logp", "Tensor", "list")),
        ("cu_seqlens", torch.tensor([0, 24]), ValueError, says("cu_seqlens", "padded", shape(4, 6))),
    ],
    ids=lambda x: x if isinstance(x, str) and len(x) < 20 else "",
)
def test_batch_fields(field: str, value: Any, kind: type[Exception], message: str):
    with pytest.raises(kind, match=message):
        fa.Batch(small().target, **{field: value})


def test_what_is_no_tensor():
    case, rows = small(), [[1, 2], [3, 4]]
    with pytest.raises(TypeError, match=says("linear_logp", "target", "Tensor", "list")):
        fa.linear_logp(case.hidden, case.weight, rows)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=says("Batch", "target", "Tensor", "ndarray")):
        fa.Batch(case.target.numpy())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=says("Batch", "cu_seqlens", "Tensor", "list")):
        fa.Batch(torch.arange(5), cu_seqlens=[0, 5])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=says("logp_from_logits", "target", "Tensor", "list")):
        fa.logp_from_logits(torch.zeros(2, 9), [1, 2])  # type: ignore[arg-type]


def test_batch_layout():
    target = torch.arange(5)
    with pytest.raises(ValueError, match=says("target", "cu_seqlens", shape(5))):
        fa.Batch(target)
    with pytest.raises(ValueError, match=says("target", shape(1, 1, 5))):
        fa.Batch(target[None, None])
    with pytest.raises(ValueError, match=says("cu_seqlens", "5", "4")):
        fa.Batch(target, cu_seqlens=torch.tensor([0, 2, 4]))
    with pytest.raises(ValueError, match=says("cu_seqlens", "5", "1")):
        fa.Batch(target, cu_seqlens=torch.tensor([1, 2, 5]))
    with pytest.raises(ValueError, match=says("cu_seqlens", "rise")):
        fa.Batch(target, cu_seqlens=torch.tensor([0, 4, 2, 5]))
    with pytest.raises(ValueError, match=says("cu_seqlens", "integer")):
        fa.Batch(target, cu_seqlens=torch.tensor([0.0, 5.0]))
    with pytest.raises(TypeError, match=says("target", "int64", "int32")):
        fa.Batch(target.int(), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=says("labels", r"\[B, T\]", shape(5))):
        fa.Batch.from_labels(target)
    with pytest.raises(ValueError, match=says("unit", "tokens", "rows")):
        fa.Batch(target[None]).count("rows")


def test_kto_kl():
    with pytest.raises(ValueError, match=says("kto_kl", shape(2, 3), shape(2, 4))):
        fa.kto_kl(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 3, dtype=torch.int64))
