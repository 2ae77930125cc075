"""What AlignTrainer and its settings refuse, in sentences, and what comes near to that and is not refused."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from training import config, logged, lora, trainer
from transformers import TrainingArguments

import fused_align as fa
from fused_align.train import AlignTrainer

pytestmark = [
    # peft 0.21 asks transformers 5 for an attribute by its old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


# ---- models and adapters ---------------------------------------------------------------------------------


def test_a_model_that_has_an_adapter_already_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    injected = tiny.model()
    injected.add_adapter(lora())
    for model in (peft.get_peft_model(tiny.model(), lora()), injected):
        with pytest.raises(ValueError, match="already has an adapter.*merge_and_unload.*load_model"):
            trainer(tmp_path, model)


def test_a_model_that_cannot_learn_is_refused_to_train_and_not_to_evaluate(tmp_path):
    frozen = tiny.model().requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        trainer(tmp_path, frozen)
    args = config(tmp_path)
    found = AlignTrainer(frozen, args, None, tiny.pairs(2), tiny.tokenizer()).evaluate()
    assert found["eval_rewards/margins"] == 0.0


@pytest.mark.parametrize("start", ["pissa", "olora", False])
def test_an_adapter_that_does_not_start_at_the_base_is_refused(tmp_path, start):
    peft_config = lora()
    peft_config.init_lora_weights = start
    with pytest.raises(ValueError, match="changes the model before the first step.*init_lora_weights=True"):
        trainer(tmp_path, peft_config=peft_config)


def test_an_adapter_that_adds_to_the_loss_is_refused(tmp_path):
    peft = pytest.importorskip("peft")
    adalora = peft.AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10)
    with pytest.raises(ValueError, match="AdaLoRA adds a term to the loss"):
        trainer(tmp_path, peft_config=adalora)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gaussian", "dora", "ia3"])
def test_adapters_that_start_at_the_base_are_trained(tmp_path, kind, dtype):
    peft = pytest.importorskip("peft")
    peft_config = lora()
    if kind == "ia3":
        peft_config = peft.IA3Config(
            task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]
        )
    elif kind == "dora":
        peft_config.use_dora = True
    else:
        peft_config.init_lora_weights = "gaussian"
    it = trainer(tmp_path, tiny.model().to(dtype), peft_config=peft_config, max_steps=1)
    it.train()
    assert logged(it)[0] == pytest.approx(math.log(2), abs=1e-5 if dtype == torch.float32 else 0.05)


def test_an_adapter_that_trains_biases_of_the_base_is_refused(tmp_path):
    peft_config = lora()
    peft_config.bias = "all"
    with pytest.raises(ValueError, match="bias='all'.*trains biases of the base"):
        trainer(tmp_path, peft_config=peft_config)


# ---- settings and data -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "dpoo"}, r"must be one of \['aot'.*Did you mean 'dpo'"),
        ({"loss_args": {"betta": 0.1}}, r"DPO has no field 'betta'.*Did you mean 'beta'"),
        ({"loss": "sft", "humanline": True}, "clips a log-ratio"),
        ({"humanline": 1.5}, r"null, true, \[low, high\]"),
        ({"sync_every": -1}, "sync_every must be 0"),
        ({"max_length": 1}, "max_length must leave room"),
        ({"scale_rewards": "batch"}, 'scale_rewards must be "group" or "none"'),
        ({"remove_unused_columns": True}, "remove_unused_columns must be false"),
        ({"bf16_full_eval": True}, "more coarsely than the reference"),
        ({"plan": "fast"}, r"AlignConfig: plan must be one of \['auto'.*got 'fast'"),
        ({"backend": "tritn"}, r"AlignConfig: backend must be .*got 'tritn'"),
        ({"precision": "low"}, 'precision must be "high" or "bf16"; got \'low\''),
        ({"workspace_mib": 0}, "workspace_mib must be above 0, or null.*got 0"),
        ({"workspace_mib": -1.5}, "workspace_mib must be above 0, or null.*got -1.5"),
        ({"workspace_mib": "much"}, "workspace_mib must be a number; got 'much'"),
        ({"humanline": ["a", "b"]}, "a bound of humanline must be a number; got 'a'"),
        ({"loss_args": {"beta": "high"}}, r"loss_args\.beta must be a number; got 'high'"),
        ({"loss_args": {"beta": True}}, r"loss_args\.beta must be a number; got True"),
        ({"loss_args": {"beta": None}}, r"loss_args\.beta must be a number; got None"),
        ({"loss": "grpo", "loss_args": {"max_length": 1.5}}, r"loss_args\.max_length must be a whole number"),
        (
            {"loss": "grpo", "loss_args": {"kl_correction": 2}},
            r"loss_args\.kl_correction must be true or false",
        ),
        ({"loss": "grpo", "loss_args": {"kl": 3}}, r"loss_args\.kl must be text.*got 3"),
    ],
)
def test_settings_that_do_not_fit_say_so(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label_smoothing_factor": 0.1}, r"loss_args: \{label_smoothing"),
        ({"rows": tiny.pairs(4).to_iterable_dataset()}, "got a IterableDataset, expected a datasets.Dataset"),
        ({"held_out": {"a": tiny.pairs(4).to_iterable_dataset()}}, "got a IterableDataset"),
        (
            {"accelerator_config": {"dispatch_batches": True}},
            "has dispatch_batches=True.*chosen answers from",
        ),
        ({"accelerator_config": {"split_batches": True}}, "has split_batches=True.*chosen answers from"),
    ],
)
def test_what_cannot_be_trained_this_way_is_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings)


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        (tiny.model(), None, "args must be an AlignConfig; got a NoneType"),
        (
            tiny.model(),
            TrainingArguments("x", use_cpu=True),
            "args must be an AlignConfig; got a TrainingArguments",
        ),
        ("some/name", None, "args must be an AlignConfig"),
        (
            "some/name",
            "config",
            "model must be a causal language model; got the text 'some/name'.*load_model",
        ),
        (tiny.tokenizer(), "config", "model must be a causal language model; got a Tokeni"),
    ],
)
def test_what_is_no_model_or_no_config_is_named(tmp_path, model, args, message):
    args = config(tmp_path) if args == "config" else args
    with pytest.raises(TypeError, match=message):
        AlignTrainer(model, args, tiny.pairs(2), None, tiny.tokenizer())


def test_loss_args_may_be_null_where_their_field_may(tmp_path):
    args = {"delta": None, "beta": 1, "kl_correction": "yes"}
    made = config(tmp_path, loss="grpo", loss_args=args).make_loss()
    assert made == fa.GRPO(delta=None, beta=1.0, kl_correction=True)


def test_ligers_own_loss_and_virtual_tokens_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    args = config(tmp_path)
    args.use_liger_kernel = True  # set afterwards: TrainingArguments may ask for the package
    with pytest.raises(ValueError, match="fused_linear_cross_entropy: false"):
        AlignTrainer(tiny.model(), args, tiny.pairs(2), None, tiny.tokenizer())
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PromptTuningConfig puts virtual tokens before the prompt"):
        trainer(tmp_path, peft_config=prompts)
