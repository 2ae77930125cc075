"""attach: the model's own forward computes the loss; heads of other architectures; what is refused."""

from __future__ import annotations

import copy
import inspect

import pytest
import tiny
import torch
from torch import nn
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

import fused_align as fa
from fused_align.integrations import transformers as integration
from fused_align.integrations.transformers import AlignRequest, attach, head_of

# peft 0.21 asks transformers 5 for an attribute by its old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 60,
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 32,
    "initializer_range": 0.5,
}

MODELS = {
    "llama": lambda: tiny.model(initializer_range=0.5),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)),
    "cohere2, scale": lambda: Cohere2ForCausalLM(Cohere2Config(**SIZES, logit_scale=0.3)),
    "gemma2, cap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)),
    "granite, divisor": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "phi, bias": lambda: PhiForCausalLM(PhiConfig(**(SIZES | {"num_key_value_heads": 2}))),
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    head = model.get_output_embeddings()
    if head.bias is not None:
        nn.init.normal_(head.bias)
    return model.eval()


def batch_of_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(3, 60, (4, 9))
    mask = torch.ones_like(tokens)
    mask[1, 6:] = 0
    labels = torch.where(mask.bool(), tokens, -100)
    labels[:, :3] = -100
    return tokens, mask, labels


@pytest.mark.parametrize("name", MODELS)
def test_scores_and_gradients_are_those_of_the_models_own_logits(name):
    model = made(name)
    tokens, mask, labels = batch_of_tokens()
    target = fa.Batch.from_labels(labels).target
    logits = model(input_ids=tokens, attention_mask=mask).logits
    expected = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    expected = torch.where(target != -100, expected, 0.0)
    weights = torch.randn(expected.shape)
    (expected * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    attach(model)
    logp = model(input_ids=tokens, attention_mask=mask, align=AlignRequest(target=target))
    torch.testing.assert_close(logp, expected, atol=2e-5, rtol=1e-5)
    (logp * weights).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == gradients.keys()
    for n, p in model.named_parameters():
        if p.grad is not None:
            error = (p.grad - gradients[n]).norm() / gradients[n].norm().clamp(min=1e-6)
            assert error < 1e-4, n


def test_loss_inside_forward_equals_align_loss_on_the_hidden_states():
    model = attach(made("llama"))
    tokens, mask, labels = batch_of_tokens()
    batch = fa.Batch.from_labels(labels, ref_logp=torch.zeros(4, 9))
    out = model(
        input_ids=tokens,
        attention_mask=mask,
        align=AlignRequest(
            batch, fa.DPO(), humanline=fa.Humanline(), normalizer=4, kwargs={"backend": "eager"}
        ),
    )
    hidden = model.model(input_ids=tokens, attention_mask=mask).last_hidden_state
    expected = fa.align_loss(
        hidden, model.lm_head.weight, batch, fa.DPO(), humanline=fa.Humanline(), normalizer=4, backend="eager"
    )
    torch.testing.assert_close(out.loss, expected.loss)
    assert out.metrics.keys() == expected.metrics.keys()


def test_without_align_nothing_changes():
    model = made("llama")
    tokens, mask, labels = batch_of_tokens()
    before = model(input_ids=tokens, attention_mask=mask, labels=labels)
    signature = inspect.signature(model.forward)
    attach(attach(model))  # twice is once
    after = model(input_ids=tokens, attention_mask=mask, labels=labels)
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)
    assert inspect.signature(model.forward) == signature
    generated = model.generate(tokens[:1, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape[1] > 4


def test_a_deep_copy_computes_with_its_own_weights():
    model = attach(made("llama"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    tokens, mask, labels = batch_of_tokens()
    target = fa.Batch.from_labels(labels).target
    logp = twin(input_ids=tokens, attention_mask=mask, align=AlignRequest(target=target))
    uniform = torch.full_like(logp, -torch.tensor(98.0).log().item())
    torch.testing.assert_close(logp, torch.where(target != -100, uniform, 0.0))
    assert torch.equal(twin(input_ids=tokens).logits, torch.zeros(4, 9, 98))


def test_below_peft_and_without_logits():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny.model(), peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear")
    )
    attach(model)
    tokens, mask, labels = batch_of_tokens()
    target = fa.Batch.from_labels(labels).target
    calls = []
    model.get_base_model().lm_head.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        expected = model(input_ids=tokens, attention_mask=mask).logits.log_softmax(-1)
        assert calls  # the head module runs for logits ...
        calls.clear()
        logp = model(input_ids=tokens, attention_mask=mask, align=AlignRequest(target=target))
        assert not calls  # ... and not for scores
    expected = expected.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(logp, torch.where(target != -100, expected, 0.0), atol=2e-5, rtol=1e-5)


def test_lora_on_the_head_is_refused():
    peft = pytest.importorskip("peft")
    for config in (
        {"target_modules": ["lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):
        model = tiny.model(tie_word_embeddings=False)
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **config))
        with pytest.raises(NotImplementedError, match="peft wraps the language-model head"):
            attach(model)


def test_a_model_with_other_logits_than_its_head_is_refused():
    model = made("llama")
    own = model.forward
    shifted = []

    def forward(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = out.logits * 1.1
        shifted.append(1)
        return out

    model.forward = forward
    with pytest.raises(ValueError, match="are not scale"):
        attach(model)
    assert shifted


def test_a_scale_that_the_config_hides_is_noticed(monkeypatch):
    monkeypatch.setattr(integration, "DIVISOR", "no_such_key")
    with pytest.raises(ValueError, match=r"GraniteForCausalLM.*logit_scale=1\.0"):
        attach(made("granite, divisor"))


def test_refusals_say_what_to_do():
    class Headless(nn.Module):
        pass

    with pytest.raises(ValueError, match="AutoModelForCausalLM"):
        head_of(Headless())
    tokens = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match="batch and loss to train, or target alone"):
        AlignRequest()
    with pytest.raises(ValueError, match=r"got \['batch', 'loss', 'target'\]"):
        AlignRequest(fa.Batch(tokens), fa.SFT(), target=tokens)
    with pytest.raises(ValueError, match=r"got \['batch'\]"):
        AlignRequest(fa.Batch(tokens))


def test_every_model_keeps_its_own_signature():
    llama, gpt2 = made("llama"), made("gpt2")
    own = inspect.signature(llama.forward), inspect.signature(gpt2.forward)
    attach(llama)
    attach(gpt2)
    assert own[0] != own[1]
    assert (inspect.signature(llama.forward), inspect.signature(gpt2.forward)) == own


def test_unwrapping_after_mixed_precision_leaves_the_attachment_on():
    accelerate = pytest.importorskip("accelerate")
    model = attach(made("llama"))
    tokens, mask, labels = batch_of_tokens()
    request = AlignRequest(target=fa.Batch.from_labels(labels).target)
    expected = model(input_ids=tokens, attention_mask=mask, align=request)
    accelerate.state.AcceleratorState._reset_state()  # of whatever ran in this process before
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    prepared = accelerator.prepare_model(model, evaluation_mode=True)
    mixed = vars(model)["forward"]
    assert attach(model) is model and vars(model)["forward"] is mixed  # ours is below autocast
    bare = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(bare(input_ids=tokens, attention_mask=mask, align=request), expected)


def test_attaching_again_after_the_forward_was_put_back():
    model = attach(made("llama"))
    tokens, mask, labels = batch_of_tokens()
    request = AlignRequest(target=fa.Batch.from_labels(labels).target)
    expected = model(input_ids=tokens, attention_mask=mask, align=request)
    del vars(model)["forward"]
    assert torch.equal(attach(model)(input_ids=tokens, attention_mask=mask, align=request), expected)


def test_a_refused_model_stays_in_training_mode(monkeypatch):
    model = made("llama").train()
    monkeypatch.setattr(model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attach(model)
    assert model.training
