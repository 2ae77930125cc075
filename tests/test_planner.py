"""What the planner chooses, and what `explain` says of it."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from cases import generator, randn

import fused_align as fa
from fused_align.linear.plan import MIB, TILE_BYTES, Plan, Problem, choose

S, T, H, V = 8, 32, 64, 4096


def operands(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, fa.Batch]:
    hidden = randn(S, T, H, seed=1, dtype=dtype).requires_grad_()
    weight = randn(V, H, seed=2, dtype=dtype).requires_grad_()
    target = torch.randint(V, (S, T), generator=generator(3))
    target[:, :4] = -100
    return hidden, weight, fa.Batch(target, ref_logp=torch.zeros(S, T), advantage=torch.ones(S))


def lines_of(text: str) -> dict[str, str]:
    """The lines of the plans, by name."""
    names = ("score", "jacobian", "single", "window", "recompute")
    found = {line.split()[0]: line for line in text.splitlines() if line.split()[:1]}
    return {name: found[name] for name in names}


def running(text: str) -> list[str]:
    return [name for name, line in lines_of(text).items() if "runs:" in line]


@pytest.mark.parametrize(
    ("loss", "options", "plan"),
    [
        (None, {}, "recompute"),
        (fa.SFT(), {}, "single"),
        (fa.DPO(), {}, "window"),
        (fa.DPO(), {"workspace_bytes": 400_000}, "recompute"),
        (fa.SFT(label_smoothing=0.1), {"softcap": 30.0}, "recompute"),
        (fa.SFT(), {"main_grad": True}, "recompute"),
        (fa.SFT(), {"main_grad": True, "grad_scale": 1.0}, "single"),
        (fa.DPO(), {"max_live": S * T}, "recompute"),
        (fa.SFT(), {"plan": "recompute"}, "recompute"),
    ],
    ids=str,
)
def test_explain_names_the_plan_that_runs(loss: fa.Loss | None, options: dict[str, Any], plan: str):
    hidden, weight, batch = operands()
    options = dict(options)
    if options.pop("main_grad", False):
        options["main_grad"] = torch.zeros(V, H)
    text = fa.explain(hidden, weight, batch if loss else batch.target, loss, **options)
    assert running(text) == [plan]
    assert f"{S * T if 'max_live' in options else S * (T - 4)} live of {S * T} tokens" in text
    for name, line in lines_of(text).items():
        assert (" no: " in line) or re.search(r"\d+\.\d\d +\d+\.\d+ m?s +\d+\.\d", line), (name, line)


def test_explain_without_gradients_and_of_a_frozen_head():
    hidden, weight, batch = operands()
    with torch.no_grad():
        text = fa.explain(hidden, weight, batch, fa.DPO())
    assert running(text) == ["score"] and "gradients: none" in text
    frozen = weight.detach()
    assert running(fa.explain(hidden, frozen, batch, fa.SFT())) == ["jacobian"]
    # a loss that may give tokens no gradient at all had better know before the gradient products
    assert running(fa.explain(hidden, frozen, batch, fa.DPO(), humanline=fa.Humanline())) == ["window"]


def test_explain_refuses_what_the_call_would_refuse():
    hidden, weight, batch = operands()
    with pytest.raises(TypeError, match="pass a Batch together with a loss"):
        fa.explain(hidden, weight, batch.target, fa.SFT())
    with pytest.raises(ValueError, match="plan='window' cannot serve this call"):
        fa.explain(hidden, weight, batch, fa.SFT(), plan="window")
    with pytest.raises(ValueError, match="weight must be"):
        fa.explain(hidden, weight.t(), batch, fa.SFT())
    with pytest.raises(ValueError, match='backend must be "auto" or one of'):
        fa.explain(hidden, weight, batch, fa.SFT(), backend="cudnn")


def big(**changes: Any) -> Problem:
    given: dict[str, Any] = {
        "rows": 16384, "given": 16384, "hidden": 4096, "vocab": 128256, "work": torch.float32,
        "hidden_dtype": torch.bfloat16, "weight_dtype": torch.bfloat16, "operand": None, "rounded": False,
        "device": torch.device("cuda"), "grad_hidden": True, "grad_head": True, "coupling": "token",
    }  # fmt: skip
    return Problem(**(given | changes))


def test_on_a_gpu_the_fast_plan_takes_chunks_of_thousands_of_rows():
    """Each chunk reads and writes the float32 dweight once: 735 / rows of its GEMM."""
    chosen = choose(big(), workspace_bytes=6 << 30)
    assert chosen.name == "single" and chosen.rows >= 4096
    chosen = choose(big(sizes=(2048,) * 8, coupling="pair"), workspace_bytes=6 << 30)
    assert chosen.name == "window" and chosen.rows >= 4096
    assert choose(big(), workspace_bytes=1 << 30).name == "recompute"


@pytest.mark.parametrize("budget", [1, 1000, 4 * MIB, 64 * MIB, 1024 * MIB])
@pytest.mark.parametrize("coupling", ["token", "pair", None])
def test_a_plan_keeps_to_its_budget_or_to_the_smallest_tile(budget: int, coupling: str | None):
    for rows in (1, 100, 5000):
        problem = big(
            rows=rows, given=rows, hidden=576, vocab=49152, device=torch.device("cpu"), coupling=coupling,
            sizes=(rows // 4, rows - rows // 4) if coupling == "pair" else (),
        )  # fmt: skip
        chosen = choose(problem, workspace_bytes=budget)
        needed = problem.bytes(chosen.name, chosen.rows, chosen.cols, chosen.apart)
        smallest = min(rows, 32) * 256
        assert needed <= budget or chosen.rows * chosen.cols <= smallest, chosen


# ---- sizes -----------------------------------------------------------------------------------------------


def problem(rows: int, hidden: int, vocab: int, kind: str = "meta", **changes: Any) -> Problem:
    """A trainable bfloat16 head with the gradients of a loss per token; "meta" is planned for as a GPU is."""
    half = torch.bfloat16
    given: dict[str, Any] = {"grad_hidden": True, "grad_head": True, "coupling": "token", **changes}
    return Problem(
        rows, rows, hidden, vocab, torch.float32, half, half, None, False, torch.device(kind), **given
    )


def test_a_small_budget_of_a_gpu_gets_tiles_that_fill_it():
    """dhidden of all rows would be the whole budget: it is formed apart, as soon as chunks are needed."""
    whole = problem(8192, 2048, 256_000)
    found = choose(whole, "auto", 64 * MIB)
    assert (found.name, found.apart) == ("recompute", True)
    assert found.rows * found.cols >= 1 << 20 and found.rows >= 512
    assert whole.bytes(found.name, found.rows, found.cols, found.apart) <= 64 * MIB


@pytest.mark.parametrize("coupling", ["token", "pair"])
@pytest.mark.parametrize(
    ("rows", "hidden", "vocab"), [(8192, 2048, 256_000), (16384, 4096, 128_256), (32768, 3584, 152_064)]
)
def test_the_default_budget_of_a_gpu_is_for_chunks_of_4096_rows(
    rows: int, hidden: int, vocab: int, coupling: str
):
    sizes = (256,) * (rows // 256) if coupling == "pair" else ()
    found = choose(problem(rows, hidden, vocab, coupling=coupling, sizes=sizes))
    assert found.name == ("window" if coupling == "pair" else "single")
    assert found.rows >= 3500 and found.cols >= 4096


def test_a_windows_chunk_is_as_large_as_its_pairs_fill_it():
    """What does not fill it would only narrow its tiles."""
    sizes = (300,) * 20
    found = choose(problem(6000, 1024, 50_000, coupling="pair", sizes=sizes), "window", 400 * MIB)
    assert found.rows % 300 == 0 and found.rows < 6000
    # pieces of pairs that are too large fill theirs
    mixed = problem(6040, 1024, 50_000, coupling="pair", sizes=(3000, 40, 3000))
    assert choose(mixed, "window", 300 * MIB).rows > 500


@pytest.mark.parametrize("rows", [107, 1000, 4096])
def test_more_memory_never_costs_more(rows: int):
    """Neither where dhidden begins to wait instead of being formed apart."""
    one = problem(rows, 4096, 128_256)
    budgets = (12, 16, 24, 30, 31, 32, 40, 64, 128, 256)
    found = [choose(one, "recompute", mib * MIB) for mib in budgets]
    costs = [one.cost(plan) for plan in found]
    assert all(after <= before * 1.02 for before, after in itertools.pairwise(costs)), costs
    assert {plan.apart for plan in found} == {False, True} or rows == 107


@pytest.mark.parametrize("mib", [64, 256, 272])
def test_the_cheapest_of_all_sizes_is_taken(mib: int):
    """Of rows with dhidden apart, which may be many, and of fewer that let it wait."""
    one = problem(16384, 3584, 152_064, "cpu")
    found = choose(one, "recompute", mib * MIB)
    every = [Plan("recompute", 16384 >> halved, cols, apart) for halved in range(1, 10)
             for cols in range(256, 2049, 256) for apart in (False, True)]  # fmt: skip
    fitting = [
        plan for plan in every
        if plan.rows <= 2048 and plan.rows * plan.cols <= 1 << 21
        and one.bytes("recompute", plan.rows, plan.cols, plan.apart) <= mib * MIB
    ]  # fmt: skip
    assert one.cost(found) <= min(map(one.cost, fitting))


@pytest.mark.parametrize("kind", ["cpu", "meta"])
@pytest.mark.parametrize("mib", [1, 16, 100, 1024, 8192])
def test_sizes_keep_to_the_budget_and_use_it(kind: str, mib: int):
    for plan in ("single", "recompute", "jacobian"):
        one = problem(5000, 512, 100_000, kind, grad_head=plan != "jacobian")
        try:
            found = choose(one, plan, mib * MIB)
        except ValueError as error:
            assert plan == "single" and "needs workspace_bytes >=" in str(error) and mib <= 100
            continue
        used = one.bytes(plan, found.rows, found.cols, found.apart)
        assert used <= mib * MIB or (found.rows, found.cols) == (32, 256)
        wider = one.bytes(plan, found.rows, found.cols + 256, found.apart)
        most = TILE_BYTES["cpu" if kind == "cpu" else "cuda"] // 4
        assert wider > mib * MIB or found.rows * (found.cols + 256) > most or found.cols == one.vocab
