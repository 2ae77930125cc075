"""What the parity tests share: problems, how a peer is compared with fused_align, and TRL's trainers.

A loss, ours or a peer's, is a function of a case whose operands are leaves. TRL is imported where one of its
trainers is made, so that the tests of Liger do not need it.
"""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from cases import Case, generator, gradients, leaves_of, make_case, randn
from tolerances import check_grad, check_loss
from torch import Tensor
from torch.nn.functional import log_softmax, pad

import fused_align as fa

IGNORE = -100
INSTALL = "install it with: pip install -e '.[test]'"
#: five pairs; answers of different lengths, one of them empty
LENGTHS = [7, 3, 1, 0, 5, 4, 8, 2, 6, 3]
EPS = {"eps_low": 0.2, "eps_high": 0.28}  # of our policy losses
WIDE = {"eps_low": 0.03, "eps_high": 0.05}  # for ratios of sequences, so that some are clipped
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon_low": 0.03, "epsilon_high": 0.05}  # peers' WIDE

Function = Callable[[Case], Tensor]


# --- problems ---


def problem(
    lengths: list[int] = LENGTHS,
    *,
    seed: int = 0,
    holes: bool = True,
    left: bool = False,
    dtype: torch.dtype = torch.float64,
    **head: Any,
) -> Case:
    """Every column of a batch; anchors so near that clips bite on some tokens only.

    holes: ignored tokens inside sequences too. left: every answer starts at position 0.
    """
    case = make_case(lengths, width=max(lengths) + (not left), H=6, V=23, seed=seed, head=head)
    target = case.target
    if left:
        order = (target == IGNORE).to(torch.int8).sort(dim=1, stable=True).indices
        target = target.gather(1, order)
    if holes:
        first = (target != IGNORE).to(torch.int8).cumsum(1) == 1
        hole = torch.rand(target.shape, generator=generator(seed + 21)) < 0.2
        target = torch.where(hole & ~first, IGNORE, target)
    columns = {
        **case.columns,
        "sampler_logp": case.columns["old_logp"] + 0.4 * randn(*target.shape, seed=seed + 22),
    }
    return replace(case, target=target, columns=columns).to(dtype)


def at_least_one(lengths: list[int] = LENGTHS) -> list[int]:
    """The same without empty sequences."""
    return [max(length, 1) for length in lengths]


def certain(dtype: torch.dtype) -> Case:
    """A pair whose chosen answer has probability 1 to the last digit: a log-prob of exactly 0."""
    case = problem([3, 2], holes=False, dtype=dtype)
    case.target[0][case.target[0] != IGNORE] = 5
    case.hidden[0, :, 1:] = 0
    case.hidden[0, :, 0] = 1
    case.weight[:, 0] = -60
    case.weight[5, 0] = 60
    return case


def ignoring(case: Case, drop: Tensor) -> Case:  # drop [S, T] bool
    return replace(case, target=case.target.masked_fill(drop, IGNORE))


# --- comparing ---


def ours(loss: fa.Loss, *, normalizer: float | None = None, **changes: Tensor | None) -> Function:
    """fa.align_loss with columns of the batch changed; a changed `target` is one too."""

    def run(at: Case) -> Tensor:
        at = replace(at, target=changes.get("target", at.target))
        batch = at.batch(**{name: field for name, field in changes.items() if name != "target"})
        return fa.align_loss(at.hidden, at.weight, batch, loss, **at.head, normalizer=normalizer).loss

    return run


def plus(*terms: tuple[float, Function]) -> Function:
    return lambda at: torch.stack([weight * function(at) for weight, function in terms]).sum()


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch.tensor(0.1) and the like inside a peer have this dtype: float64 problems stay float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def run(function: Function, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    leaves = leaves_of(case)
    value = function(case.with_operands(leaves))
    return value.detach(), gradients(value, leaves)


def run_peer(peer: Function, case: Case) -> tuple[Tensor, dict[str, Tensor]]:
    with default_dtype(case.hidden.dtype):
        return run(peer, case)


def check_same(case: Case, peer: Function, mine: Function, dtype: torch.dtype | None = None) -> None:
    """The same value, and the same gradients of hidden, weight and bias, which are not all 0.

    dtype: the narrowest that anything is rounded to on the way, whose tolerances apply; None: the problem's.
    """
    dtype = dtype or case.hidden.dtype
    want, want_grad = run_peer(peer, case)
    got, got_grad = run(mine, case)
    assert got_grad.keys() == want_grad.keys() == case.operands().keys()
    check_loss(got, want.double(), dtype)
    for name, grad in want_grad.items():
        assert grad.abs().max() > 0, f"{name} has no gradient: nothing is compared"
        check_grad(got_grad[name], grad.double(), dtype, name)


# --- what TRL's trainers hold ---


def tokens(case: Case) -> Tensor:  # [S, T+1]
    """Token ids with a prompt of one token in front; that token says which row of hidden states is meant."""
    return torch.cat([torch.arange(case.target.shape[0])[:, None], case.target.clamp(min=0)], dim=1)


def masked(case: Case) -> Tensor:  # [S, T+1]
    """1 at the tokens of answers, of `tokens`."""
    return pad((case.target != IGNORE).long(), (1, 0))


class Model:
    """Stands for a language model: its hidden states are given, its head is hidden @ weight.T.

    Called as TRL calls it, with the fused head (log-probs and statistics of the labels, 0 where ignored) or
    without (logits, with one position more than there are hidden states). Position i predicts token i + 1.
    """

    training = True
    is_gradient_checkpointing = False

    _modules: ClassVar[dict[str, Any]] = {}  # accelerate looks for compiled ones, where peft is installed

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:  # [R, T, H], [V, H]
        self.hidden, self.weight = hidden, weight

    def __call__(
        self, input_ids: Tensor, labels: Tensor | None = None, fused_lm_head: bool = False, **_: Any
    ) -> Any:
        from transformers.modeling_outputs import CausalLMOutput

        logits = self.hidden[input_ids[:, 0]] @ self.weight.T
        if not fused_lm_head:
            return CausalLMOutput(logits=pad(logits, (0, 0, 0, 1)))
        assert labels is not None
        live, target = labels[:, 1:] != IGNORE, labels[:, 1:].clamp(min=0)
        log_p = log_softmax(logits, -1)
        found = {
            "log_probs": log_p.gather(-1, target[..., None]).squeeze(-1),
            "entropy": -(log_p.exp() * log_p).sum(-1),
            "log_sum_sq_probs": (2 * log_p).logsumexp(-1),
            "mean_logits": logits.mean(-1),
            "is_top1": logits.argmax(-1) == target,
        }
        return SimpleNamespace(
            **{name: torch.where(live, x, torch.zeros_like(x)) for name, x in found.items()},
            label_mask=live,
            aux_loss=None,
        )


class OwnHead(Model):
    """The same with TRL's own fused head on it, which computes in float32."""

    config = SimpleNamespace(get_text_config=SimpleNamespace)

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:  # [R, T, H], [V, H]
        super().__init__(hidden, weight)
        outputs = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
        importlib.import_module("trl.trainer.utils").add_fused_lm_head(self, outputs=outputs)

    def base_model(self, input_ids: Tensor, **_: Any) -> Any:
        return SimpleNamespace(last_hidden_state=pad(self.hidden[input_ids[:, 0]], (0, 0, 0, 1)))

    def get_output_embeddings(self) -> Any:
        return SimpleNamespace(weight=self.weight, bias=None)

    def forward(self, *args: Any, **given: Any) -> Any:
        raise NotImplementedError("add_fused_lm_head puts its own in place of this")

    def __call__(self, *args: Any, **given: Any) -> Any:
        return self.forward(*args, **given)


class Fixed(Model):
    """A model of which only the log-probs are known: the reference, or the policy that sampled."""

    def __init__(self, logp: Tensor) -> None:  # [R, T]
        self.logp = logp

    def __call__(self, input_ids: Tensor, labels: Tensor | None = None, **_: Any) -> Any:
        assert labels is not None
        return SimpleNamespace(log_probs=self.logp[input_ids[:, 0]].masked_fill(labels[:, 1:] == IGNORE, 0))


class Accelerator:
    """accelerate's, for a single process on a CPU."""

    device = torch.device("cpu")
    num_processes, process_index, is_main_process, sync_gradients = 1, 0, True, True
    parallelism_config = None
    autocast = staticmethod(contextlib.nullcontext)
    gather = gather_for_metrics = unwrap_model = staticmethod(lambda x: x)
    reduce = staticmethod(lambda x, reduction: x)
    pad_across_processes = staticmethod(lambda x, dim, pad_index: x)


TRAINERS = {
    "SFTTrainer": "trl.trainer.sft_trainer",
    "DPOTrainer": "trl.trainer.dpo_trainer",
    "KTOTrainer": "trl.trainer.kto_trainer",
    "GRPOTrainer": "trl.trainer.grpo_trainer",
    "RLOOTrainer": "trl.trainer.rloo_trainer",
    "GMPOTrainer": "trl.experimental.gmpo.gmpo_trainer",
    "CPOTrainer": "trl.experimental.cpo.cpo_trainer",
    "ORPOTrainer": "trl.experimental.orpo.orpo_trainer",
}


def trainer(name: str, model: Model, **settings: Any) -> Any:
    """A trainer of TRL with its own methods, without its constructor: no files, datasets or hub.

    Settings are attributes of the trainer and of its `args`.
    """
    with warnings.catch_warnings(), default_dtype(torch.float32):
        # it may change without notice, it says; these tests would tell
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        cls = getattr(importlib.import_module(TRAINERS[name]), name)
    settings = {
        "aux_loss_enabled": False,
        "report_to": [],
        "gradient_checkpointing_kwargs": None,
        "average_tokens_across_devices": False,
        "current_gradient_accumulation_steps": 1,
    } | settings
    made = cls.__new__(cls)
    made.__dict__.update(
        settings,
        args=SimpleNamespace(**settings),
        model=model,
        accelerator=Accelerator(),
        state=SimpleNamespace(global_step=0),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    return made


# --- TRL's losses ---


def sft(num_items: int | None = None, label_smoothing: float = 0.0) -> Function:
    """SFTTrainer.compute_loss."""

    def loss(at: Case) -> Tensor:
        from transformers.trainer_pt_utils import LabelSmoother

        made = trainer(
            "SFTTrainer",
            Model(at.hidden, at.weight),
            loss_type="nll",
            compute_loss_func=None,
            label_smoother=LabelSmoother(label_smoothing) if label_smoothing else None,
        )
        ids, mask = tokens(at), masked(at)
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORE)}
        return made.compute_loss(made.model, inputs, num_items_in_batch=num_items)

    return loss


DPO_SETTINGS = {
    "beta": 0.3,
    "label_smoothing": 0.0,
    "f_divergence_type": "reverse_kl",
    "f_alpha_divergence_coef": 0.5,
    "ld_alpha": None,
    "use_weighting": False,
    "discopop_tau": 0.2,
    "precompute_ref_logps": False,
}


def dpo(
    *loss_types: str, weights: list[float] | None = None, prompt: bool = True, **settings: Any
) -> Function:
    """DPOTrainer._compute_loss. prompt: whether the first token of a sequence is not an answer's."""

    def loss(at: Case) -> Tensor:
        made = trainer(
            "DPOTrainer",
            Model(at.hidden, at.weight),
            ref_model=Fixed(at.columns["ref_logp"]),
            loss_types=list(loss_types),
            loss_weights=weights or [1.0] * len(loss_types),
            **DPO_SETTINGS | settings,
        )
        ids, mask = tokens(at), masked(at)
        if not prompt:
            mask[:, 0] = 1
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
        return made._compute_loss(made.model, inputs, False)

    return loss


def kto(mismatched: Case, loss_type: str = "kto", **settings: Any) -> Function:
    """KTOTrainer._compute_loss; rows S and up of the model are those of the mismatched completions."""

    def loss(at: Case) -> Tensor:
        made = trainer(
            "KTOTrainer",
            Model(torch.cat([at.hidden, mismatched.hidden]), at.weight),
            ref_model=Fixed(torch.cat([at.columns["ref_logp"], mismatched.columns["ref_logp"]])),
            precompute_ref_logps=False,
            calculate_KL=loss_type == "kto",
            loss_type=loss_type,
            **{"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.0} | settings,
        )
        other = tokens(mismatched)
        other[:, 0] += at.hidden.shape[0]
        inputs = {
            "input_ids": tokens(at),
            "attention_mask": torch.ones_like(other),
            "completion_mask": masked(at),
            "KL_input_ids": other,
            "KL_attention_mask": torch.ones_like(other),
            "KL_completion_mask": masked(mismatched),
            "label": at.columns["desirable"],
        }
        return made._compute_loss(made.model, inputs, False)

    return loss


def with_prompts(at: Case) -> tuple[Tensor, Tensor]:  # [S, T+1], [S, T+1]
    """Ids with tokens of a prompt in front of every answer, and what attention sees: prompt and answer."""
    ids, mask = tokens(at), masked(at)
    before = mask.cumsum(1) == 0
    drawn = torch.randint(0, at.weight.shape[0], ids.shape, generator=generator(31))
    drawn[:, 0] = ids[:, 0]
    return torch.where(before, drawn, ids), (before | (mask == 1)).long()


def without_reference(name: str, *, prompt: bool = False, **settings: Any) -> Function:
    """get_batch_loss_metrics of CPOTrainer and ORPOTrainer. prompt: whether attention sees prompts."""

    def loss(at: Case) -> Tensor:
        given = {"is_encoder_decoder": False, "pad_token_id": 0, "padding_value": 0} | settings
        made = trainer(name, Model(at.hidden, at.weight), **given)
        mask, half = masked(at), at.target.shape[0] // 2
        ids, seen = with_prompts(at) if prompt else (tokens(at), mask)
        batch = {}
        for side, rows in ("chosen", slice(half)), ("rejected", slice(half, None)):
            batch[f"{side}_input_ids"] = ids[rows]
            batch[f"{side}_attention_mask"] = seen[rows]
            batch[f"{side}_labels"] = ids.masked_fill(mask == 0, IGNORE)[rows]
        return made.get_batch_loss_metrics(made.model, batch)[0]

    return loss


def cpo(**settings: Any) -> Function:
    usual = {"beta": 0.5, "loss_type": "sigmoid", "cpo_alpha": 0.0, "alpha": 0.0}
    return without_reference("CPOTrainer", **usual | {"label_smoothing": 0.0, "simpo_gamma": 0.4} | settings)


GRPO_SETTINGS = {
    "importance_sampling_level": "token",
    "epsilon_low": 0.2,
    "epsilon_high": 0.28,
    "delta": None,
    "beta": 0.0,
    "use_bias_correction_kl": False,
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "use_vllm": False,
    "vllm_importance_sampling_correction": False,
    "steps_per_generation": 1,
    "max_completion_length": 11,
    "_entropy_bonus_enabled": False,
    "use_adaptive_entropy": False,
    "entropy_coef": 0.0,
    "sapo_temperature_pos": 0.9,
    "sapo_temperature_neg": 1.2,
    "vespo_k_pos": 2.0,
    "vespo_lambda_pos": 3.0,
    "vespo_k_neg": 3.0,
    "vespo_lambda_neg": 2.0,
}


def rollouts(at: Case, **columns: Any) -> dict[str, Any]:
    """What _compute_loss is given: answers, with a tool's output inside them where there are holes."""
    live = at.target != IGNORE
    span = (live.cumsum(1) > 0) & (live.flip(1).cumsum(1).flip(1) > 0)
    given = {
        "prompt_ids": tokens(at)[:, :1],
        "prompt_mask": torch.ones_like(at.target[:, :1]),
        "completion_ids": tokens(at)[:, 1:],
        "completion_mask": span.long(),
        "tool_mask": (live | ~span).long(),
        "advantages": at.columns["advantage"],
        "old_per_token_logps": at.columns["old_logp"],
        "old_logps": at.columns["old_logp"].masked_fill(~live, 0).sum(1),  # RLOO's
        "ref_per_token_logps": at.columns["ref_logp"],
        "sampling_per_token_logps": at.columns["sampler_logp"],
        "num_items_in_batch": live.sum(),
    }
    return {name: field for name, field in (given | columns).items() if field is not None}


def grpo(
    loss_type: str = "grpo",
    name: str = "GRPOTrainer",
    *,
    columns: dict[str, Any] | None = None,
    **settings: Any,
) -> Function:
    """_compute_loss of GRPOTrainer and its kin; columns: what of `rollouts` to change, None: to leave out."""

    def loss(at: Case) -> Tensor:
        made = trainer(
            name, Model(at.hidden, at.weight), **GRPO_SETTINGS | settings | {"loss_type": loss_type}
        )
        return made._compute_loss(made.model, rollouts(at, **columns or {}))

    return loss


def sampled(at: Case, group: int, **settings: Any) -> dict[str, Any]:
    """GRPOTrainer._generate_and_score_completions of answers that are already there, with random rewards.

    Its model is the policy before this step, so that the log-probs it takes are the case's old ones.
    """
    live = at.target != IGNORE
    assert (live.cumsum(1) == live.sum(1, keepdim=True)).ge(~live).all(), "answers start at position 0"
    answers, sampler = (
        [row[mask].tolist() for row, mask in zip(column, live, strict=True)]
        for column in (at.target, at.columns["sampler_logp"])
    )
    made = trainer(
        "GRPOTrainer",
        Fixed(at.columns["old_logp"]),
        ref_model=Fixed(at.columns["ref_logp"]),
        **GRPO_SETTINGS
        | {
            "use_vllm": True,
            "vllm_importance_sampling_correction": True,
            "environment_factories": None,
            "environments": None,
            "tools": None,
            "pad_to_multiple_of": None,
            "mask_truncated_completions": False,
            "num_iterations": 1,
            "gradient_accumulation_steps": 1,
            "per_device_train_batch_size": len(answers),
            "num_generations": group,
            "multi_objective_aggregation": "sum_then_normalize",
            "scale_rewards": "group",
            "reward_weights": torch.ones(1),
            "reward_func_names": ["random"],
            "_logs": defaultdict(list, rewards=defaultdict(list), extra=defaultdict(list)),
            "_pending_extra_logs": {},
            "_pending_metrics": {},
            "log_multimodal": False,
            "_tokenizer": SimpleNamespace(pad_token_id=0),
        }
        | settings,
    )
    prompts = [[row] for row in range(len(answers))]
    rewards = torch.rand(len(answers), 1, generator=generator(41), dtype=torch.float64)
    made._generate = lambda _: (prompts, answers, None, answers, sampler, {}, None, None)
    made._calculate_rewards = lambda *_: rewards
    with default_dtype(at.hidden.dtype):
        return made._generate_and_score_completions([{"prompt": str(row)} for row in range(len(answers))])
