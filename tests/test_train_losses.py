"""Every loss of the registry in AlignTrainer: steps of two micro-batches; sums of losses; saved states."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import training
from cases import REGISTRY
from datasets import Dataset
from tolerances import LOSS
from torch import Tensor
from training import assert_same, logged, weights
from transformers import TrainerCallback

import fused_align as fa
from fused_align.train import AlignTrainer
from fused_align.train import data as data_module
from fused_align.train.data import kind_of

TOLERANCE = LOSS[torch.float32]
#: fields without which a loss has nothing to show here
FIELDS: dict[str, dict[str, Any]] = {
    "grpo": {"beta": 0.1, "kl_correction": True, "entropy_coef": 0.01},
    "ppo": {"top_entropy": 0.5, "beta": 0.1},
    "dpo": {"wpo": True, "ld_alpha": 0.5},
    "sft": {"label_smoothing": 0.1, "z_loss": 0.01},
    "betadpo": {"keep": 0.5},
    "bco": {"beta": 0.1},
    "reinforce": {"beta": 0.05},
}
NO_ROWS = ("hybridpolicy",)  # edits have no column in the trainer's rows
TRAINED = [name for name in REGISTRY if name not in NO_ROWS]
SUMS: dict[str, dict[str, Any]] = {
    "dpo + 0.5*sft": {},  # of the chosen answers
    "cpo + 2*bcopair": {"cpo": {"alpha": 0.5}},
    "0.3*grpo + reinforce": {},
    "kto + 0.1*sft": {},
    "kto + 2*bco": {"bco": {"beta": 0.1}},
    "1e-1*betadpo+sft": {"betadpo": {"keep": 0.5}},
}


def rows_for(loss: fa.Loss, n: int = 12) -> Dataset:
    """Rows of the kind that the loss trains on; GRAO's have a reference answer, the last one."""
    kind = kind_of(loss)
    if kind == "pair":
        return tiny.pairs(n)
    if kind == "text":
        return tiny.pairs(n).rename_column("chosen", "completion").remove_columns("rejected")
    if kind in ("unpaired", "judged"):
        return tiny.judged(n)
    rows = tiny.groups(n)
    marks = [[False] * (len(answers) - 1) + [True] for answers in rows["completions"]]
    return rows.add_column("reference", marks)


class Whole(TrainerCallback):
    """At the beginning of every step, the loss over all its rows at once, and of what there are how many."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.fetched: list[list[dict[str, Any]]] = []  # the examples of each micro-batch
        self.loss: list[float] = []
        self.states: list[Any] = []
        self.kl: Tensor | None = None
        self.shadow: fa.Loss | None = None  # with a state of its own

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        size = args.gradient_accumulation_steps
        parts = self.fetched[state.global_step * size :][:size]
        whole = [example for part in parts for example in part]
        if self.shadow is None:
            self.shadow = copy.deepcopy(self.trainer.loss)
        if self.trainer.loss.needs_kl:  # of all of the step, whatever is computed
            self.kl = self.trainer._reference_point([self.batch(whole)[1]["mismatched"]])
        if self.shadow.item == "batch":  # micro-batches cannot be exchanged for the whole
            count = self.shadow.counts(self.batch(whole)[0].live())
            losses = [self.computed(part, normalizer=count) for part in parts]
            self.loss.append(float(torch.stack(losses).sum()))
        else:
            self.loss.append(float(self.computed(whole)))
        self.states.append(self.shadow.state_dict())

    def batch(self, examples: list[dict[str, Any]]) -> tuple[fa.Batch, dict[str, Any]]:
        inputs = copy.copy(self.trainer.data_collator)(examples)  # `watched` takes no note of a copy
        names = ("advantage", "desirable", "margin", "group", "reference")
        fields = {name: inputs[name] for name in names if name in inputs}
        if "initial_logp" in inputs:
            fields |= {"old_logp": inputs["initial_logp"], "ref_logp": inputs["initial_logp"]}
        return fa.Batch.from_labels(inputs["labels"], kl=self.kl, **fields), inputs

    def computed(self, examples: list[dict[str, Any]], **options: Any) -> Tensor:
        batch, inputs = self.batch(examples)
        model, names = self.trainer.model, ("input_ids", "attention_mask")
        hidden = model.model(**{name: inputs[name] for name in names}).last_hidden_state.detach()
        # under grad, so that the shadow's averages move on
        return fa.align_loss(hidden, model.lm_head.weight, batch, self.shadow, **options).loss.detach()


def watched(
    monkeypatch: pytest.MonkeyPatch, folder: Path, loss: str, loss_args: Any = None, **settings: Any
) -> tuple[AlignTrainer, Whole]:
    """A trainer of two steps of two micro-batches, and what they should have cost."""
    watch, collate = Whole(), data_module.Collator.__call__
    built = made(folder, loss, loss_args)
    defaults = {"max_steps": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.02}
    it = training.trainer(
        folder,
        rows=rows_for(built),
        held_out=rows_for(built, 5),
        loss=loss,
        loss_args=loss_args,
        callbacks=[watch],
        **(defaults | settings),
    )
    watch.trainer, own = it, it.data_collator

    def noting(self: Any, examples: Any) -> Any:
        if self is own:
            watch.fetched.append([dict(example) for example in examples])
        return collate(self, examples)

    monkeypatch.setattr(data_module.Collator, "__call__", noting)
    return it, watch


def check(it: AlignTrainer, watch: Whole) -> None:
    """Trains. Each step's loss is that of the whole; every weight moves; evaluation is finite."""
    before = weights(it.model)
    it.train()
    assert logged(it) == pytest.approx(watch.loss, rel=TOLERANCE, abs=TOLERANCE)
    assert len(watch.loss) == 2 and all(map(math.isfinite, watch.loss))
    after = weights(it.model)
    assert all(value.isfinite().all() for value in after.values())
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    assert len({*watch.loss}) == 2  # the second step's is of moved weights
    metrics = it.evaluate()
    assert math.isfinite(metrics["eval_loss"]) and metrics["eval_tokens/live"] > 0


@pytest.mark.parametrize("name", TRAINED)
def test_every_loss_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str):
    it, watch = watched(monkeypatch, tmp_path, name, FIELDS.get(name))
    check(it, watch)
    assert type(it.loss) is REGISTRY[name]
    if it.loss.state_dict():
        assert flat(it.loss.state_dict()) == pytest.approx(flat(watch.states[-1]), rel=1e-5)


@pytest.mark.parametrize("name", SUMS)
def test_sums_train(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str):
    it, watch = watched(monkeypatch, tmp_path, name, SUMS[name])
    check(it, watch)
    assert isinstance(it.loss, fa.Sum) and len(it.loss.losses) == 2


def flat(state: dict[str, Any]) -> list[float]:
    """All numbers of a state, that of a sum too."""
    if "total" in state:
        return [*state["total"].tolist(), *state["pending"].tolist(), state["calls"]]
    return [x for part in state.values() for x in flat(part)]


# ---- what a step is divided by ---------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["cpo", "orpo", "dpo + 0.5*sft"])
def test_pairs_and_chosen_tokens_are_counted_over_the_step(tmp_path: Path, loss: str):
    args = SUMS.get(loss)
    it = training.trainer(tmp_path, rows=tiny.pairs(8), loss=loss, loss_args=args, max_steps=1)
    parts = [[it.train_dataset[i] for i in part] for part in ((0, 1, 6), (2, 7))]  # pyright: ignore
    _, count = it.get_batch_samples(iter(map(it.data_collator, parts)), 2, torch.device("cpu"))
    answers = [tiny.pairs(8)["chosen"][i] for i in (0, 1, 6, 2, 7)]
    assert count == {"pairs": 5, "tokens": sum(len(answer) + 1 for answer in answers)}


COUNTED = {"grao": {"groups": 3}, "ppo": {"tokens": 52}, "aot": {"pairs": 3}, "bco": {"sequences": 3}}


@pytest.mark.parametrize("loss", COUNTED)
def test_units_of_a_step(tmp_path: Path, loss: str):
    it = training.trainer(tmp_path, rows=rows_for(REGISTRY[loss]()), loss=loss)
    parts = [[it.train_dataset[i] for i in part] for part in ((0, 1), (2,))]  # pyright: ignore
    _, count = it.get_batch_samples(iter(map(it.data_collator, parts)), 2, torch.device("cpu"))
    assert count == COUNTED[loss]


# ---- sums, as the config reads them ----------------------------------------------------------------------


def made(folder: Path, loss: str, loss_args: Any = None, **settings: Any) -> fa.Loss:
    return training.config(folder, loss=loss, loss_args=loss_args, **settings).make_loss()


def test_a_sum_by_names(tmp_path: Path):
    got = made(tmp_path, " 2e-1*dpo + 3*ipo + .5 * simpo ", {"dpo": {"beta": 0.3}})
    assert got == fa.Sum([(0.2, fa.DPO(beta=0.3)), (3.0, fa.IPO()), (0.5, fa.SimPO())])
    assert made(tmp_path, "2e-1*dpo+3*ipo+.5*simpo", json.dumps({"dpo": {"beta": "0.3"}})) == got
    assert made(tmp_path, "0.5*dpo") == fa.Sum([(0.5, fa.DPO())])
    assert made(tmp_path, "simpo + dpo", humanline=True).anchors == ("ref",)


def test_beside_pairs_sft_learns_the_chosen_answers(tmp_path: Path):
    """Unless it is told to learn both."""
    chosen, every = fa.SFT(chosen=True), fa.SFT()
    dpo = (1.0, fa.DPO())
    assert made(tmp_path, "dpo + 0.5*sft") == fa.Sum([dpo, (0.5, chosen)])
    assert made(tmp_path, "0.5*sft + dpo", {"sft": {"chosen": "yes"}}) == fa.Sum([(0.5, chosen), dpo])
    assert made(tmp_path, "dpo + 0.5*sft", {"sft": {"chosen": False}}) == fa.Sum([dpo, (0.5, every)])
    assert made(tmp_path, "kto + sft") == fa.Sum([(1.0, fa.KTO()), (1.0, every)])
    assert made(tmp_path, "sft") == every


WRONG_SUMS: dict[str, tuple[str, Any, str]] = {
    "nothing after +": ("dpo +", None, r"loss must be a name, or a sum of names.*got 'dpo \+'"),
    "no name": ("2*", None, r"loss must be a name, or a sum.*got '2\*'"),
    "minus": ("dpo + -1*sft", None, r"loss must be a name, or a sum.*got 'dpo \+ -1\*sft'"),
    "unknown": ("dpo + 0.5*stf", None, r"loss must be one of .*got 'stf'\. Did you mean 'sft'\?"),
    "fields of one": ("dpo + sft", {"beta": 1}, r"must map \['dpo', 'sft'\] to their fields; got \{'beta'"),
    "fields of none": ("dpo + sft", {"sft": 3}, r"loss_args must map fields of SFT to values; got 3"),
    "unknown field": ("dpo + sft", {"sft": {"chosn": 1}}, r"SFT has no field 'chosn'.*'chosen'\?"),
    "bad value": ("dpo + sft", {"dpo": {"beta": "low"}}, r"loss_args\.beta must be a number; got 'low'"),
    "two kinds of tokens": (
        "cpo + sft",
        {"sft": {"chosen": False}},
        r"the tokens of chosen answers and SFT all tokens.*chosen=True",
    ),
    "no number": ("1.2.3*dpo + sft", None, r"loss must be a name, or a sum.*got '1\.2\.3\*dpo \+ sft'"),
    "a point": (".*dpo", None, r"loss must be a name, or a sum.*got '\.\*dpo'"),
    "one name twice": ("dpo + 0.5*dpo", None, r"must name each of its parts once; got 'dpo \+ 0\.5\*dpo'"),
    "a field's own check": ("dpo + sft", {"dpo": {"beta": -1.0}}, r"DPO: beta must be positive; got -1"),
}


@pytest.mark.parametrize("wrong", WRONG_SUMS)
def test_a_wrong_sum_is_refused(tmp_path: Path, wrong: str):
    loss, loss_args, says = WRONG_SUMS[wrong]
    with pytest.raises(ValueError, match=rf"(?s){says}"):
        made(tmp_path, loss, loss_args)


def test_humanline_needs_a_part_with_an_anchor(tmp_path: Path):
    with pytest.raises(ValueError, match=r"humanline clips a log-ratio.*sft \+ simpo has none"):
        made(tmp_path, "sft + simpo", humanline=True)


# ---- rows that do not fit --------------------------------------------------------------------------------


def without(loss: str, *columns: str) -> Dataset:
    return rows_for(REGISTRY[loss]()).remove_columns(list(columns))


MISSING: dict[str, tuple[dict[str, Any], Any, str]] = {
    "hybridpolicy": ({"loss": "hybridpolicy"}, tiny.groups, r"HybridPolicy reads what .* rows do not hold"),
    "sampler": (
        {"loss": "grpo", "loss_args": {"sampler_correction": "token_mask"}},
        tiny.groups,
        r"GRPO\(sampler_correction=...\) needs Batch\(sampler_logp=...\)",
    ),
    "margin": ({"loss": "madpo"}, lambda: without("madpo", "margin"), r"MADPO needs Batch\(margin=...\)"),
    "reference": ({"loss": "grao"}, tiny.groups, r"GRAO needs Batch\(reference=...\)"),
    "pairs": ({"loss": "nca"}, tiny.judged, r"columns \(prompt, chosen, rejected\)"),
    "judged": ({"loss": "bco"}, tiny.pairs, r"columns \(prompt, completion, label\)"),
    "groups": ({"loss": "grao"}, tiny.pairs, r"columns \(prompt, completions, rewards\)"),
    "a sum of pairs and groups": ({"loss": "dpo + grpo"}, tiny.pairs, r"GRPO needs Batch\(advantage=...\)"),
    "a sum of pairs and kto's": ({"loss": "dpo + kto"}, tiny.pairs, r"KTO needs Batch\(desirable=...\)"),
    "a sum of groups and kto's": ({"loss": "grpo + kto"}, tiny.groups, r"KTO needs Batch\(desirable=...\)"),
    "a sum of pairs and judged": ({"loss": "dpo + bco"}, tiny.pairs, r"BCO needs Batch\(desirable=...\)"),
}


@pytest.mark.parametrize("marks", [[True], [True, False, False, False, False], ["yes", "no"]], ids=str)
def test_marks_that_are_not_one_for_each_completion(tmp_path: Path, marks: list[Any]):
    rows = tiny.groups(1).add_column("reference", [marks])
    with pytest.raises(ValueError, match=r"Row 0: reference must say of each of the 2 completions"):
        training.trainer(tmp_path, rows=rows, loss="grao")


@pytest.mark.parametrize("what", MISSING)
def test_what_rows_lack_is_said(tmp_path: Path, what: str):
    settings, rows, says = MISSING[what]
    with pytest.raises(ValueError, match=says):
        training.trainer(tmp_path, rows=rows(), max_steps=1, **settings).train()


# ---- states in checkpoints -------------------------------------------------------------------------------


class StopAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= 3


STATES = {"bco": "bco", "betadpo": "betadpo", "sum": "1e-1*betadpo+sft"}


def run(
    folder: Path, loss: str, seed: int = 0, resume: Path | None = None, stop: bool = False
) -> AlignTrainer:
    built = made(folder, loss)
    it = training.trainer(
        folder,
        tiny.model(seed),
        rows_for(built),
        rows_for(built, 4),
        loss=loss,
        loss_args=SUMS.get(loss, FIELDS.get(loss)),
        callbacks=[StopAt()] if stop else None,
        max_steps=5,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        gradient_accumulation_steps=2,
    )
    it.train(resume_from_checkpoint=None if resume is None else str(resume))
    return it


@pytest.mark.parametrize("loss", STATES.values(), ids=STATES)
def test_a_resumed_run_has_the_state_of_an_uninterrupted_one(tmp_path: Path, loss: str):
    whole = run(tmp_path / "whole", loss)
    stopped = run(tmp_path / "broken", loss, stop=True)
    checkpoint = tmp_path / "broken" / "checkpoint-2"
    stored = torch.load(checkpoint / "loss_state.pt", weights_only=True)
    assert flat(stored) != flat(stopped.loss.state_dict())  # which is one step ahead
    resumed = run(tmp_path / "broken", loss, 5, checkpoint)
    assert_same(weights(resumed.model), weights(whole.model))
    assert flat(resumed.loss.state_dict()) == flat(whole.loss.state_dict()) != flat(stored)
    assert logged(resumed) == logged(whole) and len(logged(whole)) == 5
    assert logged(resumed, "eval_loss") == logged(whole, "eval_loss")
    lost = made(tmp_path, loss, SUMS.get(loss, FIELDS.get(loss)))
    assert flat(lost.state_dict()) != flat(stored)


@pytest.mark.parametrize("loss", STATES.values(), ids=STATES)
def test_evaluation_does_not_depend_on_the_state_nor_move_it(tmp_path: Path, loss: str):
    """Whatever training has seen, BCO's delta is that of what is evaluated, and BetaDPO keeps all pairs."""
    it = run(tmp_path, loss, stop=True)
    state, after = it.loss.state_dict(), it.evaluate()["eval_loss"]
    assert flat(it.loss.state_dict()) == flat(state)
    it.loss.load_state_dict(fresh_state(state))
    assert it.evaluate()["eval_loss"] == after


def fresh_state(state: dict[str, Any]) -> dict[str, Any]:
    if "total" not in state:
        return {place: fresh_state(part) for place, part in state.items()}
    return {"total": state["total"] * 0, "pending": state["pending"] * 0, "calls": 0}


def test_losses_without_a_state_write_none(tmp_path: Path):
    training.trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert (tmp_path / "checkpoint-1").is_dir()
    assert not (tmp_path / "checkpoint-1" / "loss_state.pt").exists()


def test_the_state_of_another_loss_is_refused(tmp_path: Path):
    run(tmp_path, "betadpo", stop=True)
    state = torch.load(tmp_path / "checkpoint-2" / "loss_state.pt", weights_only=True)
    torch.save({"0": state}, tmp_path / "checkpoint-2" / "loss_state.pt")
    with pytest.raises(ValueError, match=r"expected total \[3\].*state of another loss\?"):
        run(tmp_path, "betadpo", resume=tmp_path / "checkpoint-2")


def test_a_checkpoint_without_the_state_is_refused(tmp_path: Path):
    run(tmp_path, "bco", stop=True)
    (tmp_path / "checkpoint-2" / "loss_state.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 has no loss_state\.pt.*BCO.*another loss\?"):
        run(tmp_path, "bco", resume=tmp_path / "checkpoint-2")
