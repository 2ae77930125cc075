"""The README's code runs, and says what it promises."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import fused_align as fa

README = (Path(__file__).parents[1] / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_examples(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    import tiny

    model, reference = tiny.model(0).double(), tiny.model(1).double()
    input_ids = torch.randint(3, 98, (4, 9), generator=torch.Generator().manual_seed(0))
    labels = input_ids.clone()
    labels[:, :4] = -100
    labels[1, 6:] = -100
    names = {"torch": torch, "model": model, "reference": reference, "input_ids": input_ids, "labels": labels}
    before, after, loss, own = blocks("python")
    exec(before, names)
    dense = names["logp"]
    exec(after, names)
    got = names["logp"][:, :-1]  # the last position has no target; `before` leaves it out, and is float32
    torch.testing.assert_close(got, dense.double(), rtol=1e-5, atol=1e-5)
    exec(loss, names)
    exec(after, names)  # hidden states that have not been through a backward
    try:
        exec(own, names)
    finally:
        fa.Loss.registry.pop("margindpo", None)
    assert names["out"].loss.requires_grad and 0 < names["out"].metrics["humanline/unclipped"] <= 1
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert capsys.readouterr().out.startswith("tensor(")


def test_yaml_example() -> None:
    pytest.importorskip("transformers")
    yaml = pytest.importorskip("yaml")
    from fused_align.train import cli

    (text,) = blocks("yaml")
    _, data, args = cli.parse(yaml.load(text, cli._Loader), ["--output_dir", "elsewhere"])
    assert data.eval_dataset == "runs/data/film_dpo/heldout.jsonl"
    assert args.make_loss() == fa.DPO(beta=0.1)
    assert args.make_humanline() == fa.Humanline(-1.5, 1.5)
    assert (args.sync_every, args.learning_rate, args.max_steps) == (1, 1e-5, 40)


def test_loss_table_is_the_registry() -> None:
    """python -m bench losses --write README.md"""
    pytest.importorskip("transformers")
    report = pytest.importorskip("bench.report")
    table = re.search(r"<!-- bench:losses -->\n(.*?)\n<!-- /bench:losses -->", README, re.DOTALL)
    assert table is not None and table[1] == report.losses()
    assert f"{len(fa.Loss.registry)} in all" in README
