"""From rows of a data set, in TRL's formats, to padded batches.

| kind     | losses                 | columns                                                             |
|----------|------------------------|---------------------------------------------------------------------|
| pair     | on pairs (DPO, CPO)    | prompt, chosen, rejected; optional margin                           |
| unpaired | KTO                    | prompt, completion, label (bool)                                    |
| judged   | BCO, APOZeroUnpaired   | the same                                                            |
| group    | PPO, GRPO, GRAO        | prompt, completions (list), rewards (list); optional reference      |
| text     | SFT                    | prompt, completion; or messages (the last one is learnt); or text   |

prompt and completion are strings, or lists of {"role", "content"} messages that go through the tokenizer's
chat template. A pair without a prompt has what chosen and rejected begin with in common as its prompt. A
completion's reward is a number, or a list of them that reward_weights sums up; null there: it does not apply.

Each row becomes an *example*: some token sequences ("input_ids", a list of lists), each with the number of
tokens that are its prompt ("prompt_lengths"). A pair has two sequences, chosen and rejected; a judged
completion has two for KTO, its own and the same prompt with the next prompt's completion (for z0); a group
has one per completion, and `reference` (a list of booleans) says which are reference answers, for GRAO.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import datasets
import torch
from torch import Tensor

from fused_align import Batch, Loss
from fused_align.batch import IGNORE_INDEX
from fused_align.losses.advantages import combine_rewards, group_advantages

from .config import DataConfig

logger = logging.getLogger(__name__)

COLUMNS = {
    "pair": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "group": (("prompt", "completions", "rewards"),),
    "unpaired": (("prompt", "completion", "label"),),
    "judged": (("prompt", "completion", "label"),),
    "text": (("prompt", "completion"), ("messages",), ("text",)),
}

FEATURES: dict[str, dict[str, Any]] = {  # of the examples
    "every": {
        "input_ids": datasets.List(datasets.List(datasets.Value("int32"))),
        "prompt_lengths": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int32"),
    },
    "pair": {},
    "unpaired": {"label": datasets.Value("bool")},
    "judged": {"label": datasets.Value("bool")},
    "group": {"advantages": datasets.List(datasets.Value("float64"))},
    "text": {},
}

Row = tuple[list[int], int]  # the tokens of a sequence, and how many of them are its prompt


def kind_of(loss: Loss) -> str:
    """Which kind of rows the loss is trained on: the first of COLUMNS that a part of it reads.

    Raises:
        ValueError: a part of it reads what no rows hold.
    """
    wanted = {part.rows: part for _, part in loss.parts}
    for rows, part in wanted.items():
        if rows not in COLUMNS:
            raise ValueError(
                f"{part.name} reads what the trainer's rows do not hold (its `rows` is {rows!r}). Call "
                "align_loss in a loop of your own."
            )
    return next(kind for kind in COLUMNS if kind in wanted)


# ---- reading ---------------------------------------------------------------------------------------------


def load_data(config: DataConfig) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """The training rows and, if the config names any, the rows to evaluate on."""
    if not config.dataset:
        raise ValueError(
            "load_data: dataset is empty; name a .jsonl or .json file, a folder, or a data set on the hub."
        )
    train = _load(config.dataset, config.dataset_config, config.dataset_split)
    held_out = None
    if config.eval_dataset is not None:
        held_out = _load(config.eval_dataset, config.dataset_config, config.eval_split or "train")
    elif config.eval_split is not None:
        held_out = _load(config.dataset, config.dataset_config, config.eval_split)
    if config.chat:
        train, held_out = to_chat(train), None if held_out is None else to_chat(held_out)
    return train, held_out


def _load(name: str, config: str | None, split: str) -> datasets.Dataset:
    if name.endswith((".json", ".jsonl")):
        return datasets.load_dataset("json", data_files=name, split=split)
    return datasets.load_dataset(name, config, split=split)


def to_chat(dataset: datasets.Dataset) -> datasets.Dataset:
    """Plain strings as messages: prompts of the user, completions of the assistant.

    Anything else stays as it is, nulls too: `prepare` names their rows.
    """

    def message(role: str, content: Any) -> Any:
        return [{"role": role, "content": content}] if isinstance(content, str) else content

    def wrap(row: dict[str, Any]) -> dict[str, Any]:
        wrapped: dict[str, Any] = {}
        for column, value in row.items():
            if column == "prompt":
                wrapped[column] = message("user", value)
            elif column in ("completion", "chosen", "rejected"):
                wrapped[column] = message("assistant", value)
            elif column == "completions" and value is not None:
                wrapped[column] = [message("assistant", one) for one in value]
        return wrapped

    return dataset.map(wrap)


# ---- tokens ----------------------------------------------------------------------------------------------


def prepare(
    dataset: datasets.Dataset,
    kind: str,
    tokenizer: Any,
    *,
    max_length: int | None = None,
    scale_rewards: str = "group",
    reward_weights: Sequence[float] | None = None,
) -> datasets.Dataset:
    """Rows as examples: columns input_ids, prompt_lengths, index, length, and margin | label | advantages.

    A sequence longer than max_length loses the end of its completion. The prompt is never cut: a row whose
    prompt leaves no room for a single completion token is left out, and so is one with nothing to learn: a
    chat without a message after its prompt, an empty text without a prompt (both are counted in the log). An
    empty completion of a prompt is learnt as the end-of-sequence token that it consists of. index numbers
    the rows that stay.

    Raises:
        ValueError: the data set lacks the columns of `kind`, has no usable row, or a row with a null text, a
            label that is not 0 or 1, or rewards that are not finite numbers or not as many as their weights
            (the row is named).
    """
    columns = _columns(dataset, kind)
    if kind == "unpaired":
        dataset = _with_mismatched(dataset)
    encode = partial(_encode_row, kind=kind, columns=columns, tokenizer=tokenizer, max_length=max_length)
    encode = partial(encode, scale_rewards=scale_rewards, reward_weights=reward_weights)
    features = dict(FEATURES["every"] | FEATURES[kind])
    if kind == "pair" and "margin" in dataset.column_names:
        if all(_finite(margin) for margin in dataset["margin"]):
            features["margin"] = datasets.Value("float64")
        else:  # of all rows: or some batches would have margins and others not
            logger.warning("The column margin is left out: not every row has a finite number there.")
    marked = kind == "group" and "reference" in dataset.column_names
    if marked and not all(isinstance(mark, list) for mark in dataset["reference"]):
        logger.warning("The column reference is left out: not every row has a list of booleans there.")
        marked = False
    if marked:
        features["reference"] = datasets.List(datasets.Value("bool"))
    encode = partial(encode, marked=marked)
    dropped = [column for column in dataset.column_names if column not in features]
    # the types are given: inferred ones would depend on which rows come first
    examples = dataset.map(
        encode, with_indices=True, remove_columns=dropped, features=datasets.Features(features)
    )
    examples = examples.filter(lambda lengths: len(lengths) > 0, input_columns="prompt_lengths")
    if len(examples) < len(dataset):
        logger.warning(
            "%d of %d rows left out: the prompt alone fills max_length=%s, or there is nothing to learn (no "
            "message after the prompt, or an empty text without one).",
            len(dataset) - len(examples),
            len(dataset),
            max_length,
        )
    if len(examples) == 0:
        raise ValueError(
            f"prepare: no usable row among {len(dataset)}; is max_length={max_length} too small?"
        )
    return examples.add_column("index", list(range(len(examples))))


def _columns(dataset: datasets.Dataset, kind: str) -> tuple[str, ...]:
    for columns in COLUMNS[kind]:
        if set(columns) <= set(dataset.column_names):
            return columns
    wanted = " or ".join("(" + ", ".join(columns) + ")" for columns in COLUMNS[kind])
    raise ValueError(
        f"The loss trains on rows with the columns {wanted}; this data set has {dataset.column_names}."
    )


def _with_mismatched(dataset: datasets.Dataset) -> datasets.Dataset:
    """Adds the column mismatched: the completion of the next row (cyclic) that has another prompt.

    Fixed for the whole training, so that the reference's log-probs of it can be computed once. Where all
    prompts are equal it is the next row's.
    """
    prompts = list(dataset["prompt"])
    n = len(prompts)
    partner = [(i + 1) % n for i in range(n)]
    # backwards, twice around: a row whose successor has the same prompt shares that successor's partner
    for i in list(reversed(range(n))) * 2:
        follower = (i + 1) % n
        if prompts[follower] == prompts[i] and prompts[partner[follower]] != prompts[i]:
            partner[i] = partner[follower]
    mismatched = (
        dataset.select(partner).select_columns("completion").rename_column("completion", "mismatched")
    )
    return datasets.concatenate_datasets([dataset, mismatched.flatten_indices()], axis=1)


def _encode_row(
    row: dict[str, Any],
    number: int,
    *,
    kind: str,
    columns: tuple[str, ...],
    tokenizer: Any,
    max_length: int | None,
    scale_rewards: str,
    reward_weights: Sequence[float] | None,
    marked: bool,
) -> dict[str, Any]:
    _check_row(row, number, columns)
    if "rewards" in columns:
        _check_rewards(row, number, reward_weights)
    prompt, completions = _prompt_and_completions(row, kind, columns)
    rows: list[Row] = []
    if all(completion != [] for completion in completions):  # chats may have no message of their own
        rows = [encode(tokenizer, prompt, completion, tools=row.get("tools")) for completion in completions]
    if max_length is not None:
        rows = [(tokens[:max_length], length) for tokens, length in rows]
    if not all(live_count(row) > 0 for row in rows):
        rows = []
    example: dict[str, Any] = {
        "input_ids": [tokens for tokens, _ in rows],
        "prompt_lengths": [length for _, length in rows],
        "length": max((len(tokens) for tokens, _ in rows), default=0),
    }
    if kind in ("unpaired", "judged"):
        example["label"] = bool(row["label"])
    if kind == "group":
        example["advantages"] = advantages(row["rewards"] or [], scale_rewards, reward_weights)
        if marked:
            example["reference"] = _references(row, number)
    return example


def _check_row(row: dict[str, Any], number: int, columns: tuple[str, ...]) -> None:
    for column in sorted({*columns, "mismatched"} - {"label", "rewards"}):
        value = row.get(column, "")
        if value is None or isinstance(value, list) and None in value:
            column = "completion of this or a later row" if column == "mismatched" else column
            raise ValueError(f"Row {number}: {column} is null, and a text is needed. Leave such rows out.")
    if "label" in columns and row["label"] not in (0, 1):
        raise ValueError(
            f"Row {number}: label must be true or false (or 1, 0), whether the completion is desirable; got "
            f"{row['label']!r}."
        )


def _check_rewards(row: dict[str, Any], number: int, weights: Sequence[float] | None) -> None:
    completions, rewards = row["completions"], row["rewards"] or []
    if len(rewards) != len(completions):
        raise ValueError(
            f"Row {number}: a group needs one reward per completion; got {len(completions)} completions and "
            f"{len(rewards)} rewards."
        )
    for reward in map(_several, rewards):
        known = [part for part in reward if part is not None]
        if not known or not all(map(_finite, known)):
            raise ValueError(
                f"Row {number}: rewards must be finite numbers, or the advantages of the whole group are "
                f"lost (of several, some may be null); got {rewards}."
            )
        expected = len(_several(rewards[0])) if weights is None else len(weights)
        if len(reward) != expected:
            raise ValueError(
                f"Row {number}: every completion needs {expected} rewards, as many as reward_weights or as "
                f"the row's first completion has; got {reward}."
            )


def _references(row: dict[str, Any], number: int) -> list[bool]:
    marks, expected = row["reference"], len(row["completions"])
    if len(marks) != expected or not all(isinstance(mark, bool) for mark in marks):
        raise ValueError(
            f"Row {number}: reference must say of each of the {expected} completions whether it is a "
            f"reference answer, true or false; got {marks}."
        )
    return marks


def _several(reward: Any) -> list[Any]:
    return reward if isinstance(reward, list) else [reward]


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _prompt_and_completions(
    row: dict[str, Any], kind: str, columns: tuple[str, ...]
) -> tuple[Any, list[Any]]:
    if kind == "pair":
        chosen, rejected = row["chosen"], row["rejected"]
        if "prompt" in columns:
            return row["prompt"], [chosen, rejected]
        shared = shared_prefix(chosen, rejected)
        if isinstance(chosen, str):  # up to a word's beginning
            shared = chosen.rfind(" ", 0, shared) if " " in chosen[:shared] else 0
        return chosen[:shared], [chosen[shared:], rejected[shared:]]
    if kind == "unpaired":
        return row["prompt"], [row["completion"], row["mismatched"]]
    if kind == "judged":
        return row["prompt"], [row["completion"]]
    if kind == "group":
        return row["prompt"], list(row["completions"])
    if "messages" in columns:
        return row["messages"][:-1], [row["messages"][-1:]]
    if "text" in columns:
        return "", [row["text"]]
    return row["prompt"], [row["completion"]]


def encode(tokenizer: Any, prompt: Any, completion: Any, *, tools: Any = None) -> Row:
    """The tokens of prompt + completion, and how many of them are the prompt's.

    The text is tokenised as a whole, as a model reads it; the completion begins at the first token that
    differs from the prompt tokenised alone, so a token that merges the two counts as completion. Plain
    completions end with the end-of-sequence token; of a chat, what follows the last one (a newline) is
    dropped, because generation stops before it.
    """
    if isinstance(prompt, str):
        alone, whole = _ids(tokenizer, prompt, True), _ids(tokenizer, prompt + completion, True)
        if whole[-1:] != [tokenizer.eos_token_id]:
            whole = [*whole, tokenizer.eos_token_id]
        return (whole, 0) if prompt == "" else (whole, shared_prefix(alone, whole))
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    template = partial(tokenizer.apply_chat_template, tokenize=False, tools=tools)
    begun = bool(prompt) and prompt[-1]["role"] == "assistant"  # the completion goes on with this message
    messages = [*prompt, *completion]
    if begun and completion[0]["role"] == "assistant":
        joined = {**prompt[-1], "content": prompt[-1]["content"] + completion[0]["content"]}
        messages = [*prompt[:-1], joined, *completion[1:]]
    alone = template(prompt, add_generation_prompt=not begun, continue_final_message=begun) if prompt else ""
    whole = _ids(tokenizer, template(messages), False)
    length = shared_prefix(_ids(tokenizer, alone, False), whole)
    return _without_tail(tokenizer, whole, length), length


def shared_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items the two sequences begin with in common."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _ids(tokenizer: Any, text: str, special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def _without_tail(tokenizer: Any, tokens: list[int], prompt_length: int) -> list[int]:
    eos = tokenizer.eos_token_id
    if eos not in tokens[prompt_length:]:
        return tokens
    end = len(tokens) - tokens[::-1].index(eos)
    return tokens[:end] if not tokenizer.decode(tokens[end:]).strip() else tokens


def live_count(row: Row) -> int:
    """How many tokens are learnt: the completion's. A sequence's first token has nothing to predict it."""
    tokens, prompt_length = row
    return max(len(tokens) - max(prompt_length, 1), 0)


def advantages(
    rewards: Sequence[Any], scale: str = "group", weights: Sequence[float] | None = None
) -> list[float]:
    """`group_advantages` of one group; several rewards per completion are summed with the weights first."""
    if not rewards:
        return []
    table = [[math.nan if part is None else part for part in _several(reward)] for reward in rewards]
    combined = combine_rewards(torch.tensor(table, dtype=torch.float64), weights)
    return group_advantages(combined, scale=scale).tolist()


def fingerprint(dataset: datasets.Dataset) -> str:
    """A digest of the tokens and of which are learnt: tells whether stored log-probs belong to them."""
    digest = hashlib.blake2b(digest_size=16)
    for columns in zip(dataset["input_ids"], dataset["prompt_lengths"], strict=True):
        digest.update(repr(columns).encode())
    return digest.hexdigest()


# ---- batches ---------------------------------------------------------------------------------------------


def pad(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """Right-padded input_ids, attention_mask and labels [S, T] int64; labels are -100 outside completions."""
    width = max(len(tokens) for tokens, _ in rows)
    input_ids = torch.full((len(rows), width), pad_id)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE_INDEX)
    for i, (tokens, prompt_length) in enumerate(rows):
        input_ids[i, : len(tokens)] = torch.tensor(tokens)
        attention_mask[i, : len(tokens)] = 1
        labels[i, prompt_length : len(tokens)] = input_ids[i, prompt_length : len(tokens)]
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def layout(kind: str, sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Which sequences a batch holds, in order, as (example, its sequence): all chosen before all rejected.

    sizes: how many sequences each example has. A judged completion's mismatched one is not in the batch.
    """
    if kind == "pair":
        return [(e, 0) for e in range(len(sizes))] + [(e, 1) for e in range(len(sizes))]
    if kind in ("unpaired", "judged"):
        return [(e, 0) for e in range(len(sizes))]
    return [(e, j) for e, size in enumerate(sizes) for j in range(size)]


def judgements(kind: str, examples: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What the examples say about their sequences, as fields of fa.Batch in the order of `layout`."""
    examples = list(examples)
    if kind in ("unpaired", "judged"):
        return {"desirable": torch.tensor([bool(example["label"]) for example in examples])}
    if kind == "group":
        sizes = torch.tensor([len(example["advantages"]) for example in examples])
        found = {
            "advantage": torch.tensor([a for example in examples for a in example["advantages"]]),
            "group": torch.arange(len(examples)).repeat_interleave(sizes),
        }
        if all("reference" in example for example in examples):
            found["reference"] = torch.tensor([r for example in examples for r in example["reference"]])
        return found
    if kind == "pair" and all("margin" in example for example in examples):
        return {"margin": torch.tensor([float(example["margin"]) for example in examples])}
    return {}


class Collator:
    """Examples as one batch: input_ids, attention_mask, labels [S, T], the fields of `judgements`, and

    count: {unit: int}, what the loss is normalised by (`Loss.counts`); on the host, so that nobody waits for
        the device;
    initial_logp [S, T] float32: the stored log-probs under the initial model, where `scores` is set;
    mismatched: for KTO, the same (without count) of the mismatched sequences.
    """

    def __init__(self, kind: str, pad_id: int, counts: Callable[[Batch], Mapping[str, Any]]) -> None:
        self.kind, self.pad_id, self.counts = kind, pad_id, counts
        self.scores: Callable[[int], list[Tensor]] | None = (
            None  # example index -> log-probs of its sequences
        )

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        order = layout(self.kind, [len(example["prompt_lengths"]) for example in examples])
        batch: dict[str, Any] = self._rows(examples, order)
        batch |= (fields := judgements(self.kind, examples))
        if self.kind == "unpaired":
            batch["mismatched"] = self._rows(examples, [(e, 1) for e in range(len(examples))])
        whole = Batch.from_labels(batch["labels"], **fields)
        batch["count"] = {unit: int(count) for unit, count in self.counts(whole.live()).items()}
        return batch

    def _rows(self, examples: Sequence[Mapping[str, Any]], order: list[tuple[int, int]]) -> dict[str, Tensor]:
        batch = pad(
            [(examples[e]["input_ids"][j], examples[e]["prompt_lengths"][j]) for e, j in order], self.pad_id
        )
        if self.scores is not None:
            stored = [self.scores(example["index"]) for example in examples]
            batch["initial_logp"] = scatter([stored[e][j] for e, j in order], batch["labels"])
        return batch


def shifted(labels: Tensor) -> Tensor:  # [S, T] -> [S, T]
    """The target that each position predicts, -100 where it is not learnt."""
    return Batch.from_labels(labels).target


def scatter(logps: Sequence[Tensor], labels: Tensor) -> Tensor:  # [live of s] each, [S, T] -> [S, T]
    """Log-probs of live tokens at their positions, 0 elsewhere."""
    padded = torch.zeros(labels.shape)
    padded[shifted(labels) != IGNORE_INDEX] = torch.cat(list(logps))
    return padded


def gather(logp: Tensor, labels: Tensor) -> list[Tensor]:  # -> [live of s] each, float32
    """The inverse of `scatter`."""
    live = shifted(labels) != IGNORE_INDEX
    return list(logp[live].float().cpu().split(live.sum(1).tolist()))
