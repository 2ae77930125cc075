"""What the policy is measured against: stored log-probs of the initial model, and a reference that follows.

A reference that never moves is scored once: its log-probs are stored by example (ScoreTable) and written
beside the checkpoints, so that a resumed run is measured against the original model and not the resumed
weights. Under Humanline syncing the reference is a frozen copy of the trainable weights (SyncedReference):
the whole model, or a second set of LoRA weights on the same frozen base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..integrations.transformers import AlignRequest, scoring
from .data import Row, gather, pad, shifted

MODEL_INPUTS = ("input_ids", "attention_mask")


def score(
    model: nn.Module,
    inputs: Mapping[str, Tensor],  # input_ids, attention_mask, labels [S, T]
    options: Mapping[str, Any],
    weights: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Log-probs [S, T] of the labels under the attached model, or under `weights` in the place of its own."""
    request = AlignRequest(target=shifted(inputs["labels"]), kwargs=options)
    arguments = {name: inputs[name] for name in MODEL_INPUTS} | {"align": request}
    with scoring(model):
        if weights is None:
            return model(**arguments)
        return torch.func.functional_call(model, dict(weights), (), arguments)  # tied weights stay tied


class SyncedReference:
    """A frozen copy of a model's trainable weights, scored in their place on the same frozen rest."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = {
            name: parameter.detach().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def sync(self, model: nn.Module) -> None:
        """Takes the model's weights as they are now, in place."""
        current = dict(model.named_parameters())
        for name, weight in self.weights.items():
            weight.copy_(current[name])

    def save(self, path: Path) -> None:
        save_file({name: weight.contiguous() for name, weight in self.weights.items()}, path)

    def load(self, path: Path) -> None:
        """Raises ValueError where the file is missing or holds other weights."""
        if not path.is_file():
            raise ValueError(
                f"Resuming: {path} is missing, and without it the synced reference is lost. Resume from a "
                "checkpoint that AlignTrainer wrote under the same humanline and sync_every (with "
                "save_only_model: false)."
            )
        stored = load_file(path)
        if stored.keys() != self.weights.keys():
            raise ValueError(
                f"Resuming: {path} holds {len(stored)} weights and the model trains {len(self.weights)}; "
                "they must be the same. Was the checkpoint written with another adapter or model?"
            )
        for name, weight in self.weights.items():
            weight.copy_(stored[name])


class ScoreTable:
    """Log-probs of every live token of a set of examples, on the host in float32.

    table(example) -> the log-probs of each of its sequences. `rows` are all of them, example after example.
    """

    def __init__(self, rows: Sequence[Tensor], sizes: Sequence[int], fingerprint: str = "") -> None:
        self.rows, self.sizes, self.fingerprint = list(rows), list(sizes), fingerprint
        self._first = [0]
        for size in self.sizes:
            self._first.append(self._first[-1] + size)

    def __len__(self) -> int:
        return len(self.sizes)

    def __call__(self, example: int) -> list[Tensor]:
        return self.rows[self._first[example] : self._first[example + 1]]

    def save(self, path: Path, run: str) -> None:
        """run: what tells this run, and with it its initial model, from others that use the same folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "logp": torch.cat(self.rows) if self.rows else torch.zeros(0),
            "lengths": torch.tensor([row.numel() for row in self.rows]),
            "sizes": torch.tensor(self.sizes),
        }
        save_file(tensors, path, metadata={"fingerprint": self.fingerprint, "run": run})

    @classmethod
    def load(cls, path: Path, fingerprint: str, run: str) -> ScoreTable:
        """Raises ValueError if the stored log-probs are of other examples, or of another run's model."""
        with safe_open(path, framework="pt") as file:
            stored = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("logp", "lengths", "sizes")}
        if stored.get("run") != run:
            raise ValueError(
                f"Resuming: {path} holds the log-probs of another run's initial model. That run wrote over "
                "those of the run that is resumed, or had a held-out set where this one had none. Give every "
                "run an output_dir of its own."
            )
        if stored.get("fingerprint") != fingerprint:
            raise ValueError(
                f"Resuming: {path} holds the initial model's log-probs of other tokens than this data "
                "set's. The data, the tokenizer, the chat template and max_length must be those of the run "
                "that is resumed."
            )
        return cls(tensors["logp"].split(tensors["lengths"].tolist()), tensors["sizes"].tolist(), fingerprint)


def score_examples(
    dataset: Dataset,
    scorer: Callable[[dict[str, Tensor]], Tensor],  # padded rows [S, T] -> log-probs [S, T]
    *,
    pad_id: int,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    progress: str | None = None,
) -> ScoreTable:
    """The log-probs of all sequences of the examples, shared out over the processes and known to all of them.

    No DataLoader: making its iterator draws from the random number generator, and a resumed run, which reads
    the table instead, would go another way.
    """
    window = 16 * batch_size  # sorted by length inside a window: little padding, and no look at the whole set
    mine = range(rank, len(dataset), world_size)
    found: list[tuple[int, list[Tensor]]] = []
    with tqdm(
        total=len(mine), desc=progress, disable=progress is None, leave=False, dynamic_ncols=True
    ) as bar:
        for start in range(0, len(mine), window):
            chosen = mine[start : start + window]
            examples: list[dict[str, Any]] = dataset.select(list(chosen)).to_list()
            rows = [
                (e, row)
                for e, example in zip(chosen, examples, strict=True)
                for row in zip(example["input_ids"], example["prompt_lengths"], strict=True)
            ]
            scored = _score_rows([row for _, row in rows], scorer, pad_id, batch_size)
            by_example: dict[int, list[Tensor]] = {e: [] for e in chosen}
            for (e, _), logp in zip(rows, scored, strict=True):
                by_example[e].append(logp)
            found += by_example.items()
            bar.update(len(chosen))
    if world_size > 1:
        found = gather_object(found)
    found.sort(key=lambda item: item[0])
    return ScoreTable([row for _, rows in found for row in rows], [len(rows) for _, rows in found])


def _score_rows(rows: list[Row], scorer: Callable[..., Tensor], pad_id: int, batch_size: int) -> list[Tensor]:
    by_length = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    scored: list[Tensor] = [torch.empty(0)] * len(rows)
    for start in range(0, len(rows), batch_size):
        part = by_length[start : start + batch_size]
        inputs = pad([rows[i] for i in part], pad_id)
        for i, logp in zip(part, gather(scorer(inputs).cpu(), inputs["labels"]), strict=True):
            scored[i] = logp
    return scored
