"""AlignTrainer on a tiny model: the reference, accumulation, evaluation, precision."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import run_two_ranks
import tiny
import torch
from tolerances import LOSS
from training import ROWS, assert_same, logged, lora, trainer, weights
from transformers import TrainerCallback

import fused_align as fa
from fused_align.train import AlignConfig, AlignTrainer
from fused_align.train.reference import SyncedReference

pytestmark = [
    # peft 0.21 asks transformers 5 for an attribute by its old name
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


class Recorder(TrainerCallback):
    """The policy's weights before each update, and the reference's after it."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.reference: list[dict[str, torch.Tensor]] = []
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before.append(weights(model))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.reference.append({k: v.clone() for k, v in self.trainer.reference.weights.items()})


# ---- the reference ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_the_reference_takes_the_weights_from_before_the_update_on_steps_that_are_due(
    tmp_path, every, adapter
):
    recorder = Recorder()
    peft_config = lora() if adapter else None
    it = trainer(
        tmp_path,
        humanline=True,
        sync_every=every,
        max_steps=7,
        peft_config=peft_config,
        callbacks=[recorder],
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
    )
    recorder.trainer = it
    initial = weights(it.model)
    it.train()
    expected = initial
    for step in range(7):
        if (step + 1) % every == 0:
            expected = recorder.before[step]
        assert_same(recorder.reference[step], {name: expected[name] for name in recorder.reference[step]})
    moved = [name for name, value in weights(it.model).items() if not torch.equal(value, initial[name])]
    assert set(moved) == set(recorder.reference[0])  # what is trained is what is copied, and all of it moved
    assert all(("lora_" in name) == adapter for name in moved)


def test_the_synced_reference_scores_like_a_model_with_its_weights(tmp_path):
    it = trainer(tmp_path, humanline=True, max_steps=3)
    it.train()
    assert it.reference is not None
    inputs = it.data_collator([it.train_dataset[i] for i in range(3)])  # pyright: ignore
    twin = tiny.model(seed=1)
    twin.load_state_dict(it.model.state_dict())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(it.reference.weights[name])
        logp = twin.eval()(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits.log_softmax(
            -1
        )
    target = fa.Batch.from_labels(inputs["labels"]).target
    expected = torch.where(target != -100, logp.gather(-1, target.clamp(min=0)[..., None])[..., 0], 0.0)
    before, policy = weights(it.model), it._score("policy", inputs)
    torch.testing.assert_close(it._score("synced", inputs), expected, atol=2e-5, rtol=1e-5)
    assert not torch.allclose(policy, expected, atol=1e-3)  # the policy is one update ahead
    assert_same(weights(it.model), before)  # and was lent its place back


def test_tied_weights_are_copied_once_and_in_place():
    model = tiny.model()
    reference = SyncedReference(model)
    assert "lm_head.weight" not in reference.weights
    places = [value.data_ptr() for value in reference.weights.values()]
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1.0)
    reference.sync(model)
    assert places == [value.data_ptr() for value in reference.weights.values()]
    assert torch.equal(reference.weights["model.embed_tokens.weight"], model.lm_head.weight)


def test_scoring_leaves_the_random_number_generator_alone(tmp_path):
    it = trainer(tmp_path, tiny.model(attention_dropout=0.5), humanline=True, held_out=tiny.pairs(4))
    it.model.train()
    state = torch.get_rng_state()
    inputs = it.data_collator([it.train_dataset[0]])  # pyright: ignore
    assert torch.equal(it._score("synced", inputs), it._score("synced", inputs))  # no dropout
    it.initial_scores("eval", it.held_out["eval"])
    assert torch.equal(torch.get_rng_state(), state)
    assert it.model.training


def test_plain_dpo_starts_at_log_2_and_measures_against_the_initial_model(tmp_path):
    it = trainer(tmp_path, max_steps=2)
    it.train()
    assert logged(it)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert logged(it, "rewards/margins")[0] == pytest.approx(0.0, abs=1e-6)
    assert it.reference is None  # nothing but the stored log-probs is kept


def test_the_clip_bites_when_the_policy_runs_away_from_a_reference_that_stays(tmp_path):
    it = trainer(tmp_path, humanline=[-0.01, 0.01], sync_every=0, max_steps=3)
    assert it.reference is None
    it.train()
    assert logged(it, "humanline/unclipped")[0] == 1.0 > logged(it, "humanline/unclipped")[-1]


# ---- normalisation ---------------------------------------------------------------------------------------

LOSSES = [
    ("sft", {}, None),
    ("dpo", {}, True),
    ("ipo", {}, None),
    ("kto", {}, True),
    ("kto", {}, None),
    ("grpo", {"beta": 0.1}, True),
    ("ppo", {}, None),
]


@pytest.mark.parametrize(("loss", "loss_args", "humanline"), LOSSES)
def test_micro_batches_add_up_to_the_big_batch(tmp_path, loss, loss_args, humanline):
    def run(size: int, accumulate: int) -> AlignTrainer:
        it = trainer(
            tmp_path,
            loss=loss,
            loss_args=loss_args,
            humanline=humanline,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_steps=3,
            logging_steps=1,
        )
        it.train()
        return it

    big, small = run(4, 1), run(1, 4)
    assert_same(weights(small.model), weights(big.model), atol=1e-5)
    assert logged(small) == pytest.approx(logged(big), rel=LOSS[torch.float32], abs=LOSS[torch.float32])
    assert logged(small, "tokens/live") == logged(big, "tokens/live")
    moved = max((weights(big.model)[n] - p).abs().max().item() for n, p in weights(tiny.model()).items())
    assert moved > 1e-3  # the comparison is not of two runs that stood still


def test_a_last_step_with_fewer_micro_batches_counts_its_own(tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 1, "loss": "sft"}
    rows = tiny.pairs(5).rename_column("chosen", "completion").remove_columns("rejected")
    one = trainer(
        tmp_path, rows=rows, per_device_train_batch_size=1, gradient_accumulation_steps=4, **settings
    )
    whole = trainer(tmp_path, rows=rows, per_device_train_batch_size=4, **settings)
    one.train()
    whole.train()
    assert one.state.global_step == whole.state.global_step == 2
    assert_same(weights(one.model), weights(whole.model), atol=1e-5)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What run_two_ranks.py ends with, by the name of its run."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("run_two_ranks.py")
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.stem: torch.load(path, weights_only=True) for path in folder.glob("*.pt")}


@pytest.mark.parametrize("loss", run_two_ranks.LOSSES)
def test_two_processes_equal_one(tmp_path, two_ranks, loss):
    """DDP on two CPU processes, half the batch each, ends with the weights of one process with all of it."""
    two = two_ranks[loss]
    one = trainer(
        tmp_path,
        loss=loss,
        max_steps=3,
        per_device_train_batch_size=4,
        held_out=ROWS[loss](6) if loss != "sft" else None,
        **run_two_ranks.LOSSES[loss],
    )
    one.train()
    assert_same(weights(one.model), two["weights"], atol=1e-5)
    assert two["loss"] == pytest.approx(logged(one), abs=1e-5)
    assert two["live"] == logged(one, "tokens/live")
    if loss != "sft":
        metrics = one.evaluate()
        assert {k: metrics[k] for k in two["eval"]} == pytest.approx(two["eval"], abs=1e-4)


def test_two_processes_resume_like_two_that_were_not_interrupted(two_ranks):
    whole, resumed = two_ranks["whole"], two_ranks["resumed"]
    assert_same(resumed["weights"], whole["weights"])
    assert resumed["loss"] == whole["loss"] and len(whole["loss"]) == 5
    assert resumed["eval"] == whole["eval"] and whole["eval"]["eval_rewards/margins"] != 0.0


# ---- what the losses are given ---------------------------------------------------------------------------


def test_kto_reference_point_is_the_mean_over_the_steps_mismatched_pairs(tmp_path):
    it = trainer(tmp_path, loss="kto", max_steps=2, gradient_accumulation_steps=2, learning_rate=0.3)
    it.train()
    batches = iter([it.data_collator([it.train_dataset[i] for i in part]) for part in ((0, 1), (2, 5))])  # pyright: ignore
    prepared, count = it.get_batch_samples(batches, 2, torch.device("cpu"))
    assert count == {"sequences": 4}
    sums = []
    for inputs in prepared:
        other = inputs["mismatched"]
        live = fa.Batch.from_labels(other["labels"]).target != -100
        log_ratio = it._score("policy", other) - other["initial_logp"]
        sums += torch.where(live, log_ratio, 0.0).sum(1).tolist()
    assert len(sums) == 4 and sum(sums) != 0
    assert (
        prepared[0]["kl"].item() == prepared[1]["kl"].item() == pytest.approx(max(sum(sums) / 4, 0), abs=1e-5)
    )


def test_grpo_is_anchored_at_the_synced_reference_and_penalised_against_the_initial_model(tmp_path):
    it = trainer(tmp_path, loss="grpo", loss_args={"beta": 0.1}, humanline=True, max_steps=3)
    first = it._score("policy", it.data_collator([it.train_dataset[0]]))  # pyright: ignore
    it.train()
    (inputs,), _ = it.get_batch_samples(
        iter([it.data_collator([it.train_dataset[0]])]),
        1,
        torch.device("cpu"),  # pyright: ignore
    )
    anchors = it._anchors(inputs)
    torch.testing.assert_close(anchors["ref_logp"], first, atol=2e-5, rtol=0)
    assert torch.equal(anchors["old_logp"], it._score("synced", inputs))  # pyright: ignore
    assert not torch.allclose(anchors["old_logp"], first, atol=1e-3)  # pyright: ignore
    assert logged(it, "kl")[0] == pytest.approx(0, abs=1e-6) and logged(it, "kl")[-1] > 1e-4


def test_every_loss_learns_what_its_data_say(tmp_path):
    for loss in ("dpo", "kto", "grpo"):
        rows = ROWS[loss](12)
        it = trainer(
            tmp_path / loss,
            rows=rows,
            held_out=rows,
            loss=loss,
            humanline=True,
            max_steps=20,
            optim="adamw_torch",
            learning_rate=3e-3,
            per_device_train_batch_size=4,
        )
        before = it.evaluate()
        it.train()
        after = it.evaluate()
        assert after["eval_loss"] < before["eval_loss"] - 0.02, loss
        if loss != "grpo":
            assert after["eval_rewards/chosen"] > 0 > after["eval_rewards/rejected"]
            continue
        initial, policy = it.tables["eval"], it._score_all("policy", it.held_out["eval"], "")
        for i, row in enumerate(rows):
            gains = [(b - a).sum().item() for a, b in zip(initial(i), policy(i), strict=True)]
            best, worst = (row["rewards"].index(pick(row["rewards"])) for pick in (max, min))
            assert gains[best] > gains[worst]


# ---- evaluation ------------------------------------------------------------------------------------------


def eager_dpo(policy: Any, initial: Any, rows: Any) -> dict[str, float]:
    """DPO's loss and metrics, one sequence at a time from full logits in float64."""
    tokenizer = tiny.tokenizer()

    def summed(model: Any, prompt: str, completion: str) -> float:
        tokens = torch.tensor([[*tokenizer(prompt + completion)["input_ids"], 1]])
        logp = model.double()(tokens).logits[0].log_softmax(-1)
        first = len(tokenizer(prompt)["input_ids"])
        return sum(logp[t - 1, tokens[0, t]].item() for t in range(first, tokens.shape[1]))

    found: dict[str, list[float]] = {name: [] for name in ("loss", "chosen", "rejected", "accuracy", "logps")}
    with torch.no_grad():
        for row in rows:
            rewards = {}
            for side in ("chosen", "rejected"):
                logp = summed(policy, row["prompt"], row[side])
                rewards[side] = 0.1 * (logp - summed(initial, row["prompt"], row[side]))
                found[side].append(rewards[side])
                if side == "chosen":
                    found["logps"].append(logp)
            margin = rewards["chosen"] - rewards["rejected"]
            found["loss"].append(math.log1p(math.exp(-margin)))
            found["accuracy"].append(float(margin > 0))
    return {name: sum(values) / len(values) for name, values in found.items()}


def test_evaluation_is_exact_unclipped_and_against_the_initial_model(tmp_path):
    rows = tiny.pairs(7)
    it = trainer(tmp_path, held_out=rows, humanline=[-0.05, 0.05], max_steps=5, per_device_eval_batch_size=2)
    it.train()
    metrics = it.evaluate()
    policy = tiny.model(seed=1)
    policy.load_state_dict(it.model.state_dict())
    expected = eager_dpo(policy.eval(), tiny.model().eval(), rows)
    assert metrics["eval_loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert metrics["eval_rewards/chosen"] == pytest.approx(expected["chosen"], abs=1e-5)
    assert metrics["eval_rewards/rejected"] == pytest.approx(expected["rejected"], abs=1e-5)
    assert metrics["eval_rewards/accuracies"] == pytest.approx(expected["accuracy"])
    assert metrics["eval_logps/chosen"] == pytest.approx(expected["logps"], abs=1e-4)
    assert abs(metrics["eval_rewards/margins"]) > 0.05  # far beyond what the synced reference would show
    assert "eval_humanline/unclipped" not in metrics


@pytest.mark.parametrize("loss", ["dpo", "kto", "grpo", "sft"])
def test_evaluation_does_not_depend_on_the_batch_size(tmp_path, loss):
    rows = ROWS[loss](7)
    if loss == "sft":
        rows = rows.rename_column("chosen", "completion").remove_columns("rejected")
    found = []
    for size in (1, 3, 64):
        it = trainer(
            tmp_path, loss=loss, rows=rows, held_out=rows, per_device_eval_batch_size=size, max_steps=2
        )
        it.train()
        found.append({k: v for k, v in it.evaluate().items() if "runtime" not in k and "per_second" not in k})
    assert found[0] == pytest.approx(found[1], abs=1e-5, nan_ok=True)
    assert found[0] == pytest.approx(found[2], abs=1e-5, nan_ok=True)
    assert "eval_loss" in found[0]


def test_several_held_out_sets_and_one_that_nobody_knew(tmp_path):
    it = trainer(tmp_path, held_out={"a": tiny.pairs(3), "b": tiny.pairs(5)}, max_steps=1)
    it.train()
    metrics = it.evaluate()
    assert metrics["eval_a_loss"] != metrics["eval_b_loss"]
    with pytest.raises(ValueError, match="was not given to the constructor"):
        it.evaluate(tiny.pairs(2))  # pyright: ignore


# ---- adapters, precision, memory -------------------------------------------------------------------------


def test_lora_trains_the_adapter_only_and_saves_one_that_loads(tmp_path):
    peft = pytest.importorskip("peft")
    base = weights(tiny.model())
    it = trainer(tmp_path, humanline=True, held_out=tiny.pairs(4), peft_config=lora(), max_steps=3)
    it.train()
    after = {name: value for name, value in weights(it.model.get_base_model()).items() if "lora_" not in name}
    assert_same({name.replace(".base_layer", ""): value for name, value in after.items()}, base)
    inputs = it.data_collator([it.train_dataset[0]])  # pyright: ignore
    policy = it._score("policy", inputs)
    torch.testing.assert_close(
        it._score("initial", inputs), score_of(tiny.model(), inputs), atol=2e-5, rtol=0
    )
    assert not torch.allclose(policy, it._score("initial", inputs), atol=1e-3)
    it.save_model()
    assert not list(tmp_path.glob("*/adapter_config.json"))  # one adapter: the reference is not saved with it
    loaded = peft.PeftModel.from_pretrained(tiny.model(), tmp_path)
    torch.testing.assert_close(score_of(loaded, inputs), policy, atol=1e-5, rtol=0)


def score_of(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    from fused_align.integrations.transformers import attach
    from fused_align.train.reference import score

    return score(attach(model), inputs, {})


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_follows_float32(tmp_path, autocast):
    model = tiny.model() if autocast else tiny.model().to(torch.bfloat16)
    low = trainer(tmp_path, model, held_out=tiny.pairs(4), bf16=autocast, humanline=True)
    high = trainer(tmp_path, held_out=tiny.pairs(4), humanline=True)
    low.train()
    high.train()
    # the policy and its reference are rounded alike, or the first loss would not be log 2
    assert logged(low)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert logged(low) == pytest.approx(logged(high), abs=0.05)
    assert next(low.model.parameters()).dtype == (torch.float32 if autocast else torch.bfloat16)
    assert low.evaluate()["eval_loss"] == pytest.approx(high.evaluate()["eval_loss"], abs=0.05)


def test_evaluation_before_training_under_autocast_scores_as_later(tmp_path):
    it = trainer(tmp_path, held_out=tiny.pairs(4), bf16=True, learning_rate=0.0, max_steps=1)
    it.evaluate()  # stores the initial model's log-probs before Trainer has prepared the model
    it.train()
    assert it.evaluate()["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-6)


def test_the_adapter_is_drawn_from_the_seed(tmp_path):
    drawn = []
    for noise in (1, 2):
        model, peft_config = tiny.model(), lora()
        torch.manual_seed(noise)
        drawn.append(weights(trainer(tmp_path, model, peft_config=peft_config).model))
    assert_same(drawn[1], drawn[0])


@pytest.mark.parametrize("adapter", [False, True])
def test_activation_checkpointing_changes_no_number(tmp_path, adapter):
    found = []
    fields = AlignConfig.__dataclass_fields__  # transformers has renamed it
    name = next(x for x in ("activation_checkpointing", "gradient_checkpointing") if x in fields)
    for checkpointing in (False, True):
        peft_config = lora() if adapter else None
        it = trainer(tmp_path, humanline=True, peft_config=peft_config, **{name: checkpointing})
        it.train()
        found.append(weights(it.model))
    assert_same(found[1], found[0], atol=1e-7)


# ---- settings and reports --------------------------------------------------------------------------------


def test_metrics_reach_the_reporters(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    it = trainer(
        tmp_path, humanline=True, report_to="tensorboard", run_name="x", max_steps=2, held_out=tiny.pairs(2)
    )
    it.train()
    it.evaluate()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    names = set(events.Tags()["scalars"])
    assert {"train/loss", "train/rewards/margins", "train/humanline/unclipped", "train/tokens/live"} <= names
    assert any("rewards" in name and "accuracies" in name and "eval" in name for name in names)


def test_a_workspace_below_the_logits_changes_no_number(tmp_path):
    found = []
    for mib in (None, 0.001):
        it = trainer(tmp_path, workspace_mib=mib, max_steps=3)
        it.train()
        found.append(weights(it.model))
    assert_same(found[1], found[0], atol=1e-6)


def test_inputs_keep_their_precision_under_deepspeed(tmp_path):
    it = trainer(tmp_path)
    it.is_deepspeed_enabled = True
    inputs = it._prepare_inputs(
        {"mismatched": {"initial_logp": torch.tensor([-1.234567])}, "count": {"pairs": 1}}
    )
    assert inputs == {"mismatched": {"initial_logp": torch.tensor([-1.234567])}, "count": {"pairs": 1}}


def test_kto_evaluation_averages_on_the_device_of_the_run(tmp_path, monkeypatch):
    it = trainer(tmp_path, loss="kto", held_out=tiny.judged(4))
    table, devices = it._score_all("policy", it.held_out["eval"], ""), []

    def kto_kl(*parts: torch.Tensor) -> torch.Tensor:
        devices.extend(part.device.type for part in parts)
        raise InterruptedError  # on no real device there is nothing to go on with

    monkeypatch.setattr(fa, "kto_kl", kto_kl)
    monkeypatch.setattr(type(it.args), "device", torch.device("meta"))
    with pytest.raises(InterruptedError):
        it._measure(it.held_out["eval"], table, table)
    assert devices == ["meta"] * 3


def test_metrics_are_kept_as_sums_and_of_how_many(tmp_path):
    it = trainer(tmp_path)
    it._metrics = {
        "a": torch.tensor([6.0, 3.0]),
        "b": torch.tensor([0.0, 0.0]),
        "c": torch.tensor([math.nan, 2.0]),
        "tokens/live": torch.tensor([8.0, 4.0]),
    }
    it._steps_since_log = 2
    means = it._drain_metrics()
    assert means["a"] == 2.0 and math.isnan(means["b"]) and math.isnan(means["c"])
    assert means["tokens/live"] == 4.0 and it._metrics == {} and it._steps_since_log == 0


def test_nan_says_that_nothing_was_measured_only_where_the_loss_is_finite(tmp_path):
    # all that a micro-batch holds is undesirable, except in the last of them
    rows = tiny.judged(4).remove_columns("label").add_column("label", [False, False, False, True])
    settings: dict[str, Any] = {"loss": "kto", "per_device_train_batch_size": 1, "logging_steps": 4}
    it = trainer(tmp_path, rows=rows, learning_rate=0.0, **settings)
    it.train()
    assert all(math.isfinite(logged(it, f"logps/{side}")[0]) for side in ("chosen", "rejected"))

    class Diverge(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    model.model.norm.weight.fill_(math.nan)

    it = trainer(tmp_path, logging_steps=4, callbacks=[Diverge()])
    it.train()
    names = ("rewards/margins", "logps/chosen", "rewards/chosen")
    assert [math.isnan(logged(it, name)[0]) for name in names] == [True] * 3


def test_a_window_that_is_not_full_is_in_the_last_log_and_in_no_other_run(tmp_path):
    it = trainer(tmp_path, logging_steps=3, learning_rate=0.0)
    metrics = it.train().metrics
    assert [log["step"] for log in it.state.log_history if "rewards/margins" in log] == [3, 4]
    assert metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-6) and it._metrics == {}

    class Break(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise KeyboardInterrupt

    it = trainer(tmp_path, logging_strategy="no", learning_rate=0.0, callbacks=[Break()])
    with pytest.raises(KeyboardInterrupt):
        it.train()
    it.remove_callback(Break)
    assert it._metrics
    live = it.train().metrics["tokens/live"]
    whole = trainer(tmp_path, logging_strategy="no", learning_rate=0.0)
    assert live == whole.train().metrics["tokens/live"]


def test_schedule_free_optimizers_are_told_what_their_weights_are_for(tmp_path):
    class Switched(torch.optim.SGD):
        said: list[str] = []

        def train(self) -> None:
            self.said.append("train")

        def eval(self) -> None:
            self.said.append("eval")

    it = trainer(
        tmp_path, loss="kto", held_out=tiny.judged(4), max_steps=2, eval_strategy="steps", eval_steps=1
    )
    it.optimizer, score = Switched(it.model.parameters(), lr=0.1), it._score

    def noting(who: str, inputs: Any) -> Any:
        if who == "policy":
            Switched.said.append("scored")
        return score(who, inputs)

    it._score = noting
    it.train()
    calls = [said for said, last in zip(Switched.said, [None, *Switched.said], strict=False) if said != last]
    step = ["train", "scored", "train", "eval", "scored"]
    assert calls == [*step, *step]


def test_a_synced_run_scores_the_initial_model_only_where_the_loss_reads_it(tmp_path):
    for beta, needed in ((0.0, False), (0.1, True)):
        it = trainer(tmp_path, loss="grpo", loss_args={"beta": beta}, humanline=True)
        assert it.needs_initial_scores is needed
    assert not trainer(tmp_path, humanline=True).needs_initial_scores
