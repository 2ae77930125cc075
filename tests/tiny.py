"""A model and a tokenizer small enough to train in a test: 96 characters, two layers, random weights."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m['role'][0] + ']' + m['content'] + '<eos>' + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[a]' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character, <pad> 0, <eos> 1, and a chat template."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {chr(i): i - 29 for i in range(32, 127)}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=TEMPLATE,
    )


def model(seed: int = 0, **config: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "vocab_size": 98,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,  # random models are near uniform; a wider one has something to say
        "tie_word_embeddings": True,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "bos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | config)))


def pairs(n: int = 16) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": f"q{i}:",
                "chosen": "good" * (i % 3 + 1),
                "rejected": "bad" * (i % 4 + 1),
                "margin": i / 4,
            }
            for i in range(n)
        ]
    )


def judged(n: int = 16) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": f"q{i}:",
                "completion": ("good" if i % 3 else "bad") * (i % 4 + 1),
                "label": bool(i % 3),
            }
            for i in range(n)
        ]
    )


def groups(n: int = 8) -> Dataset:
    words = ["good", "badbad", "fine", "so so"]
    return Dataset.from_list(
        [
            {
                "prompt": f"q{i}:",
                "completions": words[: 2 + i % 3],
                "rewards": [1.0, -1.0, 0.5, i % 2][: 2 + i % 3],
            }
            for i in range(n)
        ]
    )
