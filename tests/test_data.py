"""Rows to examples to batches: formats, boundaries between prompt and completion, truncation, advantages."""

from __future__ import annotations

import json
import logging
import math

import pytest
import tiny
import torch
import training
from datasets import Dataset

import fused_align as fa
from fused_align.train import cli, data
from fused_align.train.config import DataConfig

TOKENIZER = tiny.tokenizer()


def text(tokens: list[int]) -> str:
    return "".join("<eos>" if t == 1 else chr(t + 29) for t in tokens)


def prepare(rows: list[dict], kind: str, **options) -> Dataset:
    return data.prepare(Dataset.from_list(rows), kind, TOKENIZER, **options)


def split(example: dict) -> list[tuple[str, str]]:
    """(prompt, completion) of each sequence, as text."""
    rows = zip(example["input_ids"], example["prompt_lengths"], strict=True)
    return [(text(tokens[:n]), text(tokens[n:])) for tokens, n in rows]


def test_plain_pair_ends_with_eos_and_keeps_its_margin():
    (example,) = prepare(
        [{"prompt": "Q:", "chosen": "yes", "rejected": "no", "margin": 2.5, "other": 1}], "pair"
    )
    assert split(example) == [("Q:", "yes<eos>"), ("Q:", "no<eos>")]
    assert example["margin"] == 2.5 and example["index"] == 0 and "other" not in example


def test_chat_pair_scores_the_answer_up_to_its_end_of_turn():
    chat = {
        "prompt": [{"role": "user", "content": "Q"}],
        "chosen": [{"role": "assistant", "content": "yes"}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    (example,) = prepare([chat], "pair")
    # the template's blank after the end of turn is not scored: generation stops before it
    assert split(example) == [("[u]Q<eos> [a]", "yes<eos>"), ("[u]Q<eos> [a]", "no<eos>")]


def test_prompt_that_ends_with_the_assistants_first_words_is_continued():
    prompt = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "I say"}]
    tokens, length = data.encode(TOKENIZER, prompt, [{"role": "assistant", "content": " yes"}])
    assert (text(tokens[:length]), text(tokens[length:])) == ("[u]Q<eos> [a]I say", " yes<eos>")


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Is it? Yes", "Is it? No", [("Is it?", " Yes<eos>"), ("Is it?", " No<eos>")]),
        (
            [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}],
            [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "b"}],
            [("[u]Q<eos> [a]", "a<eos>"), ("[u]Q<eos> [a]", "b<eos>")],
        ),
    ],
)
def test_pair_without_a_prompt_column_shares_its_beginning(chosen, rejected, expected):
    (example,) = prepare([{"chosen": chosen, "rejected": rejected}], "pair")
    assert split(example) == expected


def test_boundary_with_tokens_that_merge_across_it():
    class Merging:
        """Tokenises "ab" as one token wherever it stands; a and b are 0 and 1."""

        eos_token_id = 9

        def __call__(self, text, add_special_tokens):
            return {"input_ids": [{"a": 0, "b": 1, "c": 2, "M": 3}[c] for c in text.replace("ab", "M")]}

    assert data.encode(Merging(), "ca", "bc") == (
        [2, 3, 2, 9],
        1,
    )  # the merged token belongs to the completion
    assert data.encode(Merging(), "ca", "cc") == ([2, 0, 2, 2, 9], 2)


def test_sft_formats():
    assert split(prepare([{"prompt": "Q:", "completion": "A"}], "text")[0]) == [("Q:", "A<eos>")]
    assert split(prepare([{"text": "abc"}], "text")[0]) == [("", "abc<eos>")]
    messages = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    assert split(prepare([{"messages": messages}], "text")[0]) == [("[u]Q<eos> [a]", "A<eos>")]


def test_unpaired_rows_carry_the_completion_of_the_next_other_prompt():
    rows = [
        {"prompt": "p", "completion": "0", "label": True},
        {"prompt": "p", "completion": "1", "label": False},
        {"prompt": "q", "completion": "2", "label": True},
        {"prompt": "r", "completion": "3", "label": True},
    ]
    examples = prepare(rows, "unpaired")
    assert [split(e) for e in examples] == [
        [("p", "0<eos>"), ("p", "2<eos>")],
        [("p", "1<eos>"), ("p", "2<eos>")],
        [("q", "2<eos>"), ("q", "3<eos>")],
        [("r", "3<eos>"), ("r", "0<eos>")],
    ]
    assert list(examples["label"]) == [True, False, True, True]
    same = prepare([{**row, "prompt": "p"} for row in rows], "unpaired")
    assert [split(e)[1][1] for e in same] == ["1<eos>", "2<eos>", "3<eos>", "0<eos>"]


def test_advantages():
    assert data.advantages([1.0, 1.0, 1.0]) == [0.0, 0.0, 0.0]
    assert data.advantages([0.1 + 0.2, 0.3], "none") != [0.0, 0.0]  # spread, however small
    assert data.advantages([5.0]) == [0.0]
    rewards = [1.0, 2.0, 6.0]
    std = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2)
    assert data.advantages(rewards) == pytest.approx([(r - 3) / (std + 1e-4) for r in rewards], abs=1e-12)
    assert data.advantages(rewards, "none") == [-2.0, -1.0, 3.0]
    assert data.advantages([]) == []


def test_advantages_of_several_rewards_each():
    assert data.advantages([[1.0, 10.0], [3.0, 20.0]], "none") == [-6.0, 6.0]
    assert data.advantages([[1.0, 10.0], [3.0, 20.0]], "none", [0.5, -1.0]) == [4.5, -4.5]
    assert data.advantages([[1.0, None], [3.0, 20.0]], "none", [1.0, 0.1]) == [-2.0, 2.0]  # 1 and 5
    assert data.advantages([1.0, 3.0], "none", [2.0]) == [-2.0, 2.0]
    assert data.advantages([[0.1, 0.2], [0.2, 0.1]]) == [0.0, 0.0]


def test_group_rows():
    row = {"prompt": "Q:", "completions": ["a", "bb", "c"], "rewards": [1.0, 0.0, 0.5]}
    (example,) = prepare([row], "group")
    assert split(example) == [("Q:", "a<eos>"), ("Q:", "bb<eos>"), ("Q:", "c<eos>")]
    assert example["advantages"] == pytest.approx(data.advantages([1.0, 0.0, 0.5]))
    with pytest.raises(ValueError, match="3 completions and 1 rewards"):
        prepare([{**row, "rewards": [1.0]}], "group")
    several = {**row, "rewards": [[1.0, 0.0], [0.0, None], [0.5, 2.0]]}
    (example,) = prepare([several], "group", reward_weights=[2.0, 1.0], scale_rewards="none")
    assert example["advantages"] == pytest.approx([2 - 5 / 3, -5 / 3, 3 - 5 / 3])


def test_reward_weights_reach_the_trainers_examples(tmp_path):
    rows = [
        {"prompt": f"q{i}:", "completions": ["a", "b"], "rewards": [[0.0, 1.0], [3.0, 0.0]]} for i in (0, 1)
    ]
    for weights, expected in ((None, [-1.0, 1.0]), ([1.0, 5.0], [1.0, -1.0])):
        settings = {"loss": "grpo", "scale_rewards": "none", "reward_weights": weights}
        made = training.trainer(tmp_path, rows=Dataset.from_list(rows), **settings)
        assert list(made.train_dataset["advantages"]) == [expected] * 2


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([], r"null or a list with a number for each reward.*got \[\]"),
        (0.5, "null or a list with a number for each reward.*got 0.5"),
        ("0.5", "null or a list with a number for each reward.*got '0.5'"),
        ([1.0, "much"], "a weight of reward_weights must be a number; got 'much'"),
        ([1.0, None], "a weight of reward_weights must be a number; got None"),
        ([1.0, math.inf], r"reward_weights must be finite; got \[1.0, inf\]"),
    ],
)
def test_reward_weights_that_are_none_are_refused(tmp_path, weights, message):
    with pytest.raises(ValueError, match=message):
        training.config(tmp_path, loss="grpo", reward_weights=weights)


def test_reward_weights_from_a_file_or_the_command_line(tmp_path):
    words = ["--reward_weights", "[1, 0.5]", "--loss", "grpo", "--use_cpu", "--report_to", "none"]
    values = {"model_name_or_path": "m", "dataset": "d", "output_dir": str(tmp_path)}
    assert cli.parse(values, words)[-1].reward_weights == [1, 0.5]
    assert cli.parse(values | {"reward_weights": [2, 1e-5]}, words[2:])[-1].reward_weights == [2, 1e-5]
    assert cli.parse(values, words[2:])[-1].reward_weights is None


def test_truncation_cuts_completions_and_drops_rows_without_room(caplog):
    rows = [
        {"prompt": "1234", "chosen": "abcdef", "rejected": "x"},
        {"prompt": "123456", "chosen": "abc", "rejected": "x"},
    ]
    with caplog.at_level(logging.WARNING, "fused_align"):
        (example,) = prepare(rows, "pair", max_length=6)
    assert split(example) == [("1234", "ab"), ("1234", "x<eos>")]
    assert "1 of 2 rows left out" in caplog.text
    with pytest.raises(ValueError, match="no usable row among 2"):
        prepare(rows, "pair", max_length=3)


def test_wrong_columns_are_named():
    with pytest.raises(ValueError, match=r"\(prompt, completion, label\).*\['prompt', 'chosen'\]"):
        prepare([{"prompt": "a", "chosen": "b"}], "unpaired")


def test_collator_puts_chosen_before_rejected_and_pads_right():
    examples = prepare(
        [
            {"prompt": "Q:", "chosen": "a", "rejected": "bcd", "margin": 1.0},
            {"prompt": "R:", "chosen": "ef", "rejected": "g", "margin": 2.0},
        ],
        "pair",
    )
    batch = data.Collator("pair", 0, fa.DPO().counts)(list(examples))
    rows = [text([t for t in row.tolist() if t]) for row in batch["input_ids"]]
    assert rows == ["Q:a<eos>", "R:ef<eos>", "Q:bcd<eos>", "R:g<eos>"]
    assert batch["attention_mask"].sum(1).tolist() == [4, 5, 6, 4]
    assert batch["margin"].tolist() == [1.0, 2.0]
    assert batch["count"] == {"pairs": 2}
    assert fa.Batch.from_labels(batch["labels"]).lengths.tolist() == [2, 3, 4, 2]


def test_stored_log_probs_land_on_their_tokens():
    examples = prepare([{"prompt": "Q:", "chosen": "a", "rejected": "bcd"}], "pair")
    collator = data.Collator("pair", 0, fa.DPO().counts)
    collator.scores = lambda index: [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -4.0, -5.0, -6.0])]
    batch = collator(list(examples))
    expected = [[0, -1, -2, 0, 0, 0], [0, -3, -4, -5, -6, 0]]  # position t predicts token t + 1
    assert batch["initial_logp"].tolist() == expected
    back = data.gather(batch["initial_logp"], batch["labels"])
    assert [row.tolist() for row in back] == [[-1, -2], [-3, -4, -5, -6]]


def test_first_token_of_a_text_has_nothing_to_predict_it():
    (example,) = prepare([{"text": "abc"}], "text")
    batch = data.Collator("text", 0, fa.SFT().counts)([example])
    assert batch["count"]["tokens"] == 3 == data.live_count((example["input_ids"][0], 0))
    assert fa.Batch.from_labels(batch["labels"]).count("tokens") == 3


def test_load_data_from_json_lines(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    file = tmp_path / "train.jsonl"
    rows = [{"prompt": f"q{i}", "completion": "a", "label": True} for i in range(4)]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    train, held_out = data.load_data(
        DataConfig(dataset=str(file), dataset_split="train[:3]", eval_split="train[3:]")
    )
    assert [row["prompt"] for row in train] == ["q0", "q1", "q2"]
    assert held_out is not None and [row["prompt"] for row in held_out] == ["q3"]
    chat, _ = data.load_data(DataConfig(dataset=str(file), chat=True))
    assert chat[0]["prompt"] == [{"role": "user", "content": "q0"}]
    assert chat[0]["completion"] == [{"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("bad", [None, math.nan])
def test_margins_that_some_rows_lack_are_left_out_of_all(bad, caplog):
    good = PAIR | {"margin": 1.0}
    with caplog.at_level("WARNING"):
        examples = prepare([good, good | {"margin": bad}], "pair")
    assert len(examples) == 2 and "margin" not in examples.column_names
    assert "margin is left out" in caplog.text
    assert "margin" not in data.Collator("pair", 0, fa.DPO().counts)(examples.to_list())


GROUP = {"prompt": "Q:", "completions": ["a", "b"], "rewards": [1.0, 0.0]}
TWICE = GROUP | {"rewards": [[1.0, 0.0], [0.0, 1.0]]}
JUDGED = {"prompt": "Q:", "completion": "a", "label": True}
PAIR = {"prompt": "Q:", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("kind", "good", "bad", "message"),
    [
        ("group", GROUP, {"rewards": [1.0, math.nan]}, "Row 1: rewards must be finite numbers.*nan"),
        ("group", GROUP, {"rewards": [1.0, math.inf]}, "Row 1: rewards must be finite numbers.*inf"),
        ("group", GROUP, {"rewards": [None, 1.0]}, "Row 1: rewards must be finite numbers.*None"),
        ("group", GROUP, {"completions": ["a", None]}, "Row 1: completions is null"),
        ("group", GROUP, {"rewards": None}, "Row 1: .*2 completions and 0 rewards"),
        (
            "group",
            TWICE,
            {"rewards": [[1.0, 2.0], [None, None]]},
            "Row 1: rewards must be finite.*None, None",
        ),
        ("group", TWICE, {"rewards": [[1.0, 2.0], [math.nan, 1.0]]}, "Row 1: rewards must be finite.*nan"),
        ("group", TWICE, {"rewards": [[1.0, 2.0], None]}, "Row 1: rewards must be finite.*None"),
        ("group", TWICE, {"rewards": [[1.0, 2.0], []]}, "Row 1: rewards must be finite"),
        ("group", TWICE, {"rewards": [[1.0, 2.0], [1.0]]}, r"Row 1: .*needs 2 rewards.*got \[1.0\]"),
        ("unpaired", JUDGED | {"label": 1}, {"label": 2}, "Row 1: label must be true or false.*got 2"),
        ("unpaired", JUDGED | {"label": "no"}, {}, "Row 0: label must be true or false.*got 'no'"),
        ("unpaired", JUDGED, {"label": None}, "Row 1: label must be true or false.*got None"),
        ("unpaired", JUDGED, {"completion": None}, "Row 0: completion of this or a later row is null"),
        ("pair", PAIR, {"rejected": None}, "Row 1: rejected is null"),
        ("text", {"text": "abc"}, {"text": None}, "Row 1: text is null"),
    ],
)
def test_rows_that_cannot_be_used_are_named(kind, good, bad, message):
    with pytest.raises(ValueError, match=message):
        prepare([good, good | bad], kind)


@pytest.mark.parametrize(("row", "got"), [(GROUP, r"\[1.0\]"), (TWICE, r"\[1.0, 0.0\]")])
def test_as_many_rewards_as_weights(row, got):
    with pytest.raises(ValueError, match=f"Row 0: every completion needs 3 rewards.*got {got}"):
        prepare([row], "group", reward_weights=[1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("kind", "good", "column"),
    [("group", GROUP, "completions"), ("unpaired", JUDGED, "prompt"), ("pair", PAIR, "chosen")],
)
def test_nulls_wrapped_as_chats_are_named_all_the_same(kind, good, column):
    rows = data.to_chat(Dataset.from_list([good, good | {column: None}]))
    with pytest.raises(ValueError, match=f"Row 1: {column} is null"):
        data.prepare(rows, kind, TOKENIZER)


def test_an_empty_completion_is_learnt_as_its_end_of_sequence(caplog):
    rows = [{"prompt": "Q:", "chosen": "", "rejected": "no"}]
    assert split(prepare(rows, "pair")[0]) == [("Q:", "<eos>"), ("Q:", "no<eos>")]
    chat = data.to_chat(Dataset.from_list(rows))
    assert split(data.prepare(chat, "pair", TOKENIZER)[0])[0] == ("[u]Q:<eos> [a]", "<eos>")
    with caplog.at_level(logging.WARNING, "fused_align"):
        assert len(prepare([{"text": ""}, {"text": "ab"}], "text")) == 1
    assert "or there is nothing to learn (no message after the prompt, or an empty text" in caplog.text


def test_labels_may_be_numbers():
    assert list(prepare([JUDGED | {"label": 1}, JUDGED | {"label": 0}], "unpaired")["label"]) == [True, False]


def test_a_chat_that_ends_where_the_other_goes_on_is_left_out():
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "a"}]
    longer = [*chat, {"role": "user", "content": "R"}]
    rows = [{"chosen": chat, "rejected": longer}, {"chosen": chat, "rejected": [*chat[:1], longer[2]]}]
    assert len(prepare(rows, "pair")) == 1


def test_the_fingerprint_tells_where_the_prompt_ends():
    one, other = (
        prepare([{"prompt": "ab", "completion": "c"}], "text"),
        prepare([{"prompt": "a", "completion": "bc"}], "text"),
    )
    assert list(one["input_ids"]) == list(other["input_ids"])
    assert data.fingerprint(one) != data.fingerprint(other)
