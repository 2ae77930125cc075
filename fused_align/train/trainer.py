"""AlignTrainer: alignment losses in Hugging Face's Trainer. Read from top to bottom, one optimizer step is

get_batch_samples    the micro-batches of a step, and all that must be known before the first of them:
                     the count the loss is divided by, the reference's log-probs, KTO's z0
compute_loss         one micro-batch; the loss is computed inside the model's forward
(backward, clipping)
FollowPolicy         under Humanline: the reference takes the policy's weights, before the update
log                  metrics gathered since the last log
evaluation_loop      the whole held-out set at once, against the initial model
"""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, ProgressCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput, get_last_checkpoint

import fused_align as fa
from fused_align.losses.base import Objective

from ..integrations.transformers import AlignRequest, attach
from . import checks, data
from .config import AlignConfig
from .reference import MODEL_INPUTS, ScoreTable, SyncedReference, score, score_examples

TABLES = "initial_logp"  # the folder, in output_dir, of the initial model's log-probs
RUN = "run_id.txt"  # in every checkpoint
LOSS = "loss_state.pt"  # in checkpoints of losses that keep averages
FIELDS = ("advantage", "desirable", "margin", "group", "reference")  # of fa.Batch, as the collator names them


class AlignTrainer(Trainer):
    """Trains a causal LM with any loss of fused_align on a data set in the format of that loss (see data.py).

    Args:
        model: a transformers causal LM; it gets `attach`ed. It is the initial model: the reference that never
            moves, and what evaluation is measured against.
        args: an AlignConfig.
        train_dataset: a datasets.Dataset of raw rows; None for a trainer that only evaluates.
        eval_dataset: the same, or a dict of them by name, or None.
        processing_class: the tokenizer.
        peft_config: trains a fresh adapter of this config; the initial model is the one with adapters off.
        callbacks: as in Trainer.

    evaluate() reports eval_loss (never clipped by Humanline) and the loss's metrics over the whole set, not
    averaged over batches, with the initial model as the reference.

    Raises:
        TypeError: a model or args of another kind.
        ValueError, NotImplementedError: a setting or a model that cannot be trained this way, in a sentence.
    """

    # compute_loss divides by the count over all micro-batches of the step; Trainer must not divide again
    loss_is_scaled_for_ga = True

    model: Any  # Trainer's union of all wrappers helps nobody
    args: AlignConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(
        self,
        model: PreTrainedModel,
        args: AlignConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> None:
        checks.arguments(args, processing_class)
        checks.model(model)
        checks.adapter(peft_config)
        checks.datasets(train_dataset, eval_dataset)
        set_seed(args.seed)  # before a fresh adapter is drawn
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)  # pyright: ignore[reportAssignmentType]
        attach(model)
        if peft_config is not None:
            checks.adapted(model)
        if train_dataset is not None:
            checks.trainable(model)
        self.loss = args.make_loss()
        self.humanline, self.schedule = args.make_humanline(), args.make_schedule()
        self.kind = data.kind_of(self.loss)
        self.options = args.call_options()
        pad_id = processing_class.pad_token_id
        self.pad_id: int = processing_class.eos_token_id if pad_id is None else pad_id

        def examples(rows: Dataset) -> Dataset:
            with args.main_process_first(desc="tokenising"):  # the others read its cache
                return data.prepare(
                    rows,
                    self.kind,
                    processing_class,
                    max_length=args.max_length,
                    scale_rewards=args.scale_rewards,
                    reward_weights=args.reward_weights,
                )

        held_out: Any = eval_dataset
        if isinstance(eval_dataset, dict):
            held_out = {name: examples(rows) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            held_out = examples(eval_dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=data.Collator(self.kind, self.pad_id, self.loss.counts),  # pyright: ignore[reportArgumentType]
            train_dataset=None if train_dataset is None else examples(train_dataset),
            eval_dataset=held_out,
            processing_class=processing_class,
            callbacks=callbacks,
        )
        self.model_accepts_loss_kwargs = True  # older releases of transformers 5 ask this instead
        self.held_out = {"eval": held_out} if isinstance(held_out, Dataset) else {}
        if isinstance(held_out, dict):
            self.held_out = {f"eval_{name}": rows for name, rows in held_out.items()}
        for rows in (self.train_dataset, *self.held_out.values()):
            if isinstance(rows, Dataset):
                self._rehearse(rows)
        self.reference = None if self.schedule is None else SyncedReference(self.model)
        self.tables: dict[str, ScoreTable] = {}  # log-probs under the initial model, by data set
        self.resumed_from: Path | None = None  # the folder of the tables that a resumed run reads
        self.run = ""  # its name in tables and checkpoints: whose initial model they belong to
        self._metrics: dict[str, Tensor] = {}  # [2] each, since the last log: the sum, and of how many
        self._steps_since_log = 0
        self.add_callback(Begin(self))
        if self.reference is not None:
            self.add_callback(FollowPolicy(self))
        if not args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(LiveProgress)

    # ---- one optimizer step ------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Any]:
        """The micro-batches of a step, complete, and how many of each unit they and all ranks have."""
        self._optimizer_mode("train")  # here already: the policy is scored with the weights that are trained
        micro_batches: list[dict[str, Any]] = [
            self._prepare_inputs(inputs) for inputs in islice(epoch_iterator, num_batches)
        ]
        if not micro_batches:
            return [], None
        units = list(micro_batches[0]["count"])
        counts = torch.tensor([[inputs["count"][unit] for unit in units] for inputs in micro_batches]).sum(0)
        if self.accelerator.num_processes > 1:
            counts = cast(Tensor, self.accelerator.reduce(counts.double().to(device), "sum"))
        # a step without a single item has a loss of 0, not 0/0
        normalizer = dict(zip(units, counts.clamp(min=1).unbind(), strict=True))
        if self.reference is not None:
            for inputs in micro_batches:
                inputs["synced_logp"] = self._score("synced", inputs)
        if self.loss.needs_kl:
            z0 = self._reference_point([inputs["mismatched"] for inputs in micro_batches])
            for inputs in micro_batches:
                inputs["kl"] = z0
        self._steps_since_log += 1
        return micro_batches, normalizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The micro-batch's part of the step's loss, times the processes: DDP and FSDP average over them."""
        batch = self._batch(inputs, inputs.get("kl"), self._anchors(inputs))
        request = AlignRequest(
            batch, self.loss, humanline=self.humanline, normalizer=num_items_in_batch, kwargs=self.options
        )
        output = model(**{name: inputs[name] for name in MODEL_INPUTS}, align=request)
        for name, value in output.metrics.items():
            # NaN where the loss is finite: this micro-batch has nothing of the kind. Else the run diverges
            measured = ~(value.isnan() & output.loss.isfinite())
            entry = torch.stack([torch.where(measured, value, 0.0).float(), measured.float()])
            self._metrics[name] = self._metrics.get(name, 0.0) + entry
        loss = output.loss * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def _batch(self, inputs: dict[str, Any], kl: Tensor | None, anchors: dict[str, Any]) -> fa.Batch:
        fields = {name: inputs[name] for name in FIELDS if name in inputs}
        return fa.Batch.from_labels(inputs["labels"], kl=kl, **fields, **anchors)

    @torch.no_grad()
    def _rehearse(self, dataset: Dataset) -> None:
        """The loss on the first rows and made-up log-probs: what it needs and the rows lack shows here."""
        collated: Any = self.data_collator([dataset[i] for i in range(min(2, len(dataset)))])
        inputs = self._prepare_inputs(collated)  # on the device, where ranks can reduce
        made_up = torch.zeros_like(inputs["labels"], dtype=torch.float32)
        anchors = self._anchors({"initial_logp": made_up} if self.measured else {})
        kl = made_up.new_zeros(()) if self.loss.needs_kl else None
        batch = self._batch(inputs, kl, anchors).live()
        stats = {name: made_up.new_zeros(batch.rows.numel()) for name in ("logp", *self.loss.reads)}
        try:
            objective = Objective(self.loss, batch, self.humanline, None)
            objective.total(stats, batch, objective.weights)
        except ValueError as error:
            raise ValueError(
                f"AlignTrainer: {self.loss.name} cannot be trained on these rows. {error}"
            ) from error

    def _optimizer_mode(self, mode: str) -> None:
        """Schedule-free optimizers keep two sets of weights: those that are trained, and their average."""
        switch = getattr(self.optimizer, mode, None)
        if callable(switch):
            switch()

    def _prepare_input(self, data: Any) -> Any:
        """To the device. Under DeepSpeed, Trainer would also round log-probs and advantages to 16 bits."""
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def _anchors(self, inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """The log-probs that the loss is anchored at: of the synced reference if there is one."""
        initial, anchor = inputs.get("initial_logp"), inputs.get("synced_logp", inputs.get("initial_logp"))
        found = {"old_logp": anchor} if "old" in self.loss.anchors else {}
        if "ref" in self.loss.anchors:
            return found | {"ref_logp": anchor}
        return found | {"ref_logp": initial}  # a KL penalty is measured against the initial model

    def _reference_point(self, mismatched: list[dict[str, Tensor]]) -> Tensor:
        """KTO's z0 over the mismatched sequences of the whole step."""
        policy, anchor, target = [], [], []
        for inputs in mismatched:
            policy.append(self._score("policy", inputs))
            anchor.append(inputs["initial_logp"] if self.reference is None else self._score("synced", inputs))
            target.append(data.shifted(inputs["labels"]))
        return fa.kto_kl(
            _stack(policy, 0.0), _stack(anchor, 0.0), _stack(target, -100), humanline=self.humanline
        )

    def _score(self, who: str, inputs: dict[str, Tensor]) -> Tensor:
        """Log-probs [S, T] under the "policy", the "synced" reference, or the "initial" model."""
        weights = self.reference.weights if who == "synced" and self.reference is not None else None
        off = who == "initial" and hasattr(self.model, "disable_adapter")
        # the same arithmetic for all three: a log-ratio is a small difference
        with self.accelerator.autocast(), self.model.disable_adapter() if off else nullcontext():
            return score(self.model, self._prepare_inputs(inputs), self.options | {"plan": "auto"}, weights)

    # ---- the initial model -------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer.train. A resumed run is measured against the model that the first run began with."""
        self.resumed_from, self.run = None, uuid.uuid4().hex
        if resume_from_checkpoint:
            self._find_tables(resume_from_checkpoint)
        if self.resumed_from is not None and not hasattr(self.model, "disable_adapter"):
            self.tables = {}  # what evaluate() scored is this process's model, not the one the run began with
        return super().train(resume_from_checkpoint, **kwargs)

    def initial_scores(self, name: str, dataset: Dataset) -> ScoreTable:
        """Log-probs of the data set under the initial model: computed once, or read by a resumed run."""
        if name in self.tables:
            return self.tables[name]
        path, fingerprint = _table(self.resumed_from or self.tables_folder, name), data.fingerprint(dataset)
        if self.resumed_from is not None and path.is_file():
            self.tables[name] = ScoreTable.load(path, fingerprint, self.run)
            return self.tables[name]
        moved = self.resumed_from is not None or self.state.global_step > 0
        if moved and not hasattr(self.model, "disable_adapter"):
            raise ValueError(
                f"AlignTrainer: the initial model's log-probs of {name} are needed, and its weights are "
                f"gone: training has begun and {path} is missing. Give the data set to the constructor, and "
                "keep that file to resume."
            )
        self.tables[name] = self._score_all("initial", dataset, "Scoring with the initial model")
        self.tables[name].fingerprint = fingerprint
        return self.tables[name]

    def save_initial_scores(self) -> None:
        """Writes them beside the checkpoints.

        Only training does, or evaluating a trained model would; and not a run that goes on in its own folder.
        """
        if self.args.should_save and self.resumed_from != self.tables_folder:
            for name, table in self.tables.items():
                table.save(_table(self.tables_folder, name), self.run)

    @property
    def tables_folder(self) -> Path:
        return Path(str(self.args.output_dir)).resolve() / TABLES

    def _find_tables(self, checkpoint: str | bool) -> None:
        """Which run a resumed one goes on, and where its tables are: beside its checkpoint, if there are any.

        That may be another folder than output_dir.
        """
        last = get_last_checkpoint(str(self.args.output_dir)) if isinstance(checkpoint, bool) else checkpoint
        if last is None:  # Trainer says so
            return
        beside, name = Path(last).resolve().parent / TABLES, Path(last) / RUN
        self.resumed_from = beside if beside.is_dir() else self.tables_folder
        self.run = name.read_text() if name.is_file() else ""

    def _score_all(self, who: str, dataset: Dataset, title: str) -> ScoreTable:
        # where a forward is a collective, all ranks must make the same number of them
        shared = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.world_size == 1
        return score_examples(
            dataset,
            lambda inputs: self._score(who, inputs),
            pad_id=self.pad_id,
            batch_size=self.args.eval_batch_size,
            rank=0 if shared else self.args.process_index,
            world_size=1 if shared else self.args.world_size,
            progress=title if self.is_world_process_zero() and not self.args.disable_tqdm else None,
        )

    @property
    def needs_initial_scores(self) -> bool:
        """Whether training itself reads the initial model's log-probs."""
        if self.reference is None:
            return self.measured
        return "ref" not in self.loss.anchors and self.loss.needs_ref

    @property
    def measured(self) -> bool:
        """Whether the loss is measured against other log-probs than the policy's."""
        return bool(self.loss.anchors) or self.loss.needs_ref

    # ---- checkpoints -------------------------------------------------------------------------------------

    def _save(self, *args: Any, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # peft looks into the base's config.json, whether the vocabulary was resized, which is not done
            # here; a base that is a GGUF file or an adapter has no such file
            warnings.filterwarnings("ignore", "Could not find a config file in", UserWarning)
            super()._save(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            (folder / RUN).write_text(self.run)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.reference is not None and self.args.should_save:
            self.reference.save(Path(output_dir) / "synced_reference.safetensors")
        if self.loss.state_dict() and self.args.should_save:  # equal on all ranks
            torch.save(self.loss.state_dict(), Path(output_dir) / LOSS)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.reference is not None and checkpoint is not None:
            self.reference.load(Path(checkpoint) / "synced_reference.safetensors")
        if self.loss.state_dict() and checkpoint is not None:
            if not (Path(checkpoint) / LOSS).is_file():
                raise ValueError(
                    f"AlignTrainer: {checkpoint} has no {LOSS}, the averages that {self.loss.name} keeps. "
                    "Was it written by a run with another loss?"
                )
            state = torch.load(Path(checkpoint) / LOSS, map_location="cpu", weights_only=True)
            self.loss.load_state_dict(state)

    # ---- what is reported --------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics gathered since the last log of the training loss; train()'s summary is one too."""
        if "loss" in logs or "train_loss" in logs:
            logs.update(self._drain_metrics())
        super().log(logs, start_time)

    def _drain_metrics(self) -> dict[str, float]:
        """Means over micro-batches and ranks; tokens/*: sums per optimizer step.

        NaN: there was nothing to measure, or a micro-batch's loss was not finite.
        """
        names = sorted(self._metrics)
        if not names:
            return {}
        gathered: Any = self.accelerator.gather(torch.stack([self._metrics[name] for name in names])[None])
        totals, counts = gathered.sum(0).unbind(1)  # of [ranks, names, 2]
        steps = max(self._steps_since_log, 1)
        self.forget_metrics()
        means, sums = (totals / counts).tolist(), (totals / steps).tolist()
        return {
            name: total if name.startswith("tokens/") else mean
            for name, mean, total in zip(names, means, sums, strict=True)
        }

    def forget_metrics(self) -> None:
        """Those of a run that was broken off are not the next one's."""
        self._metrics, self._steps_since_log = {}, 0

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Scores the whole held-out set, then computes the loss and its metrics on one batch of it all."""
        dataset = dataloader.dataset
        name = next((name for name, known in self.held_out.items() if known is dataset), None)
        if name is None:
            raise ValueError(
                "AlignTrainer.evaluate: this data set was not given to the constructor as eval_dataset, so "
                "there are no log-probs of the initial model to measure against. Give it there, as one of "
                "a dict if need be."
            )
        self._place_for_evaluation()
        self._optimizer_mode("eval")  # as Trainer's own loop; training_step switches back
        initial = self.initial_scores(name, dataset) if self.measured else None
        metrics = self._measure(dataset, self._score_all("policy", dataset, "Evaluating"), initial)
        prefixed = {f"{metric_key_prefix}_{key}": value for key, value in metrics.items()}
        nothing: Any = None  # logits are never formed, so there are no predictions
        return EvalLoopOutput(nothing, None, prefixed, len(dataset))  # pyright: ignore[reportArgumentType]

    def _place_for_evaluation(self) -> None:
        """Outside of train(), a model left for FSDP or DeepSpeed to place would still need preparing."""
        if self.is_in_train or len(self.accelerator._models) > 0:
            return
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise NotImplementedError(
                "AlignTrainer.evaluate: before train() under FSDP or DeepSpeed is not supported yet. Use "
                "eval_on_start."
            )

    @torch.no_grad()
    def _measure(self, dataset: Dataset, policy: ScoreTable, initial: ScoreTable | None) -> dict[str, float]:
        """The unclipped loss and its metrics, of one packed batch with the live tokens of all examples."""
        order = data.layout(self.kind, policy.sizes)

        def packed(table: ScoreTable) -> Tensor:  # where ranks can reduce: nccl does on the device only
            return torch.cat([table(e)[j] for e, j in order]).to(self.args.device)

        logp = packed(policy)
        lengths = torch.tensor([0, *(policy(e)[j].numel() for e, j in order)])
        fields: dict[str, Any] = data.judgements(self.kind, dataset.remove_columns("input_ids").to_list())
        fields = {name: field.to(logp.device) for name, field in fields.items()}
        if initial is not None:
            fields |= self._anchors({"initial_logp": packed(initial)})
        if self.loss.needs_kl and initial is not None:  # all ranks hold all rows
            rows = _padded([policy(e)[1] for e, _ in order], [initial(e)[1] for e, _ in order])
            fields["kl"] = fa.kto_kl(*(part.to(logp.device) for part in rows))
        target, offsets = torch.zeros_like(logp, dtype=torch.int64), lengths.cumsum(0).to(logp.device)
        batch = fa.Batch(target, cu_seqlens=offsets, **fields).live()
        objective, stats = Objective(self.loss.plain(), batch, None, None), {"logp": logp}
        loss = objective.total(stats, batch, objective.weights)
        return {"loss": loss.item()} | {
            name: value.item() for name, value in objective.metrics(stats).items()
        }


# ---- callbacks -------------------------------------------------------------------------------------------


class Begin(TrainerCallback):
    """Before the first step: empty metrics, and the initial model's log-probs of the sets that need them."""

    def __init__(self, trainer: AlignTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer.forget_metrics()
        for name, dataset in trainer.held_out.items() if trainer.measured else ():
            trainer.initial_scores(name, dataset)
        if trainer.needs_initial_scores:
            collator, dataset = (
                cast(data.Collator, trainer.data_collator),
                cast(Dataset, trainer.train_dataset),
            )
            collator.scores = trainer.initial_scores("train", dataset)
        trainer.save_initial_scores()


class FollowPolicy(TrainerCallback):
    """Humanline syncing: after backward and clipping, before the optimizer's step, when it is due."""

    def __init__(self, trainer: AlignTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        assert trainer.schedule is not None and trainer.reference is not None
        if trainer.schedule.due(state.global_step):  # not yet counted: the first step is 0
            trainer.reference.sync(trainer.model)


class LiveProgress(ProgressCallback):
    """Trainer's progress bar, with the last metrics on it instead of a line per log."""

    SHOWN = {
        "loss": "loss",
        "rewards/accuracies": "acc",
        "rewards/margins": "margin",
        "kl": "kl",
        "humanline/unclipped": "unclipped",
        "eval_loss": "eval_loss",
        "eval_rewards/accuracies": "eval_acc",
    }

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.shown: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs:
            self.shown |= {short: f"{logs[name]:.4g}" for name, short in self.SHOWN.items() if name in logs}
            self.training_bar.set_postfix(self.shown)


# ---- helpers ---------------------------------------------------------------------------------------------


def _table(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def _stack(parts: list[Tensor], fill: float) -> Tensor:  # [s_i, t_i] each -> [sum s_i, max t_i]
    width = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, width - part.shape[1]), value=fill) for part in parts])


def _padded(policy: list[Tensor], anchor: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Ragged log-probs as kto_kl takes them: padded [S, T], and a target that is live where they are."""
    target = [torch.zeros(row.numel(), dtype=torch.int64) for row in policy]
    pad = nn.utils.rnn.pad_sequence
    return pad(policy, True), pad(anchor, True), pad(target, True, -100)
