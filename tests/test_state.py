"""Losses that keep averages: BCO's delta, BetaDPO's M0 and sigma, and which pairs BetaDPO keeps."""

from __future__ import annotations

import copy
import itertools
import math
import multiprocessing
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from by_hand import LOG4, cost, tensor
from cases import Case, leaves_of, randn
from torch import Tensor

import fused_align as fa

BETA = 0.1
STEPS = [(3.0, -0.5, 1.0, 0.25), (5.0, -1.0, 0.5, -2.0), (0.75, 2.0, -4.0, 1.5)]  # D of pairs, or L


def singles(*ratios: float, **columns: Tensor) -> Case:
    """Sequences of one token, with these log-ratios; any number of them, or none."""
    S = len(ratios)
    columns = {"ref_logp": -LOG4 - tensor(*ratios)[:, None], **columns}
    return Case(torch.zeros(S, 1, 3).double(), randn(4, 3, seed=1), torch.ones(S, 1).long(), columns=columns)


def pairs(margins: tuple[float, ...]) -> Case:
    """Pairs with these D."""
    return singles(*margins, *(0.0 for _ in margins))


def judged(ratios: tuple[float, ...]) -> Case:
    """Sequences with these L; every second one is desirable."""
    return singles(*ratios, desirable=torch.arange(len(ratios)) % 2 == 0)


def both(numbers: tuple[float, ...]) -> Case:
    """What BCO and BetaDPO can read."""
    case = pairs(numbers)
    case.columns["desirable"] = torch.arange(2 * len(numbers)) % 2 == 0
    return case


def learn(case: Case, loss: fa.Loss, **options: Any) -> fa.AlignOutput:
    """A call under grad: the state moves on."""
    at = case.with_operands(leaves_of(case))
    out = fa.align_loss(at.hidden, at.weight, case.batch(), loss, **options)
    out.loss.backward()
    return out


def flat(state: Any) -> list[Any]:
    """A state, nested or not, as numbers that can be compared bit by bit."""
    if isinstance(state, dict):
        return [[name, *flat(state[name])] for name in sorted(state)]
    return state.tolist() if isinstance(state, Tensor) else [state]


def total(loss: fa.Loss) -> list[float]:
    """M0, sigma, and 1 once there was a step."""
    return loss.state_dict()["total"].tolist()


LOSSES: dict[str, fa.Loss] = {
    "bco": fa.BCO(beta=BETA),
    "betadpo": fa.BetaDPO(keep=0.5, seed=3),
    "sum": fa.Sum([(1.0, fa.BCO(beta=BETA)), (0.5, fa.SFT()), (2.0, fa.BetaDPO(keep=0.5))]),
    "nested": fa.Sum([(1.0, fa.DPO()), (2.0, fa.Sum([(1.0, fa.SFT()), (0.3, fa.BetaDPO(keep=0.5))]))]),
}


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> fa.Loss:
    """One with its initial state."""
    return copy.deepcopy(LOSSES[request.param])


def test_delta_is_the_mean_over_all_sequences_seen_this_batch_included():
    loss, seen = fa.BCO(beta=BETA), []
    for ratios in (STEPS[0], STEPS[1][:3], STEPS[2][:1]):  # batches of several sizes
        out = learn(judged(ratios), loss)
        seen += [BETA * ratio for ratio in ratios]
        delta = statistics.fmean(seen)
        away = [(BETA * ratio - delta) * (-1) ** i for i, ratio in enumerate(ratios)]
        assert float(out.loss.detach()) == pytest.approx(statistics.fmean(map(cost, away)), rel=1e-12)
        assert float(out.metrics["delta"]) == pytest.approx(delta, rel=1e-12)
        assert total(loss) == pytest.approx([sum(seen), len(seen)], rel=1e-12)


def test_delta_is_of_clipped_log_ratios_and_counts_sequences_without_live_tokens():
    case, loss = judged((2.0, 5.0, -3.0, 7.0)), fa.BCO(beta=BETA)
    case.target[3] = -100
    learn(case, loss, humanline=fa.Humanline(-1.0, 4.0))
    assert total(loss) == pytest.approx([BETA * (2 + 4 - 1), 4])


def test_delta_does_not_wait_for_the_end_of_a_step():
    """A micro-batch is compared with all that was seen before it, whatever the normalizer."""
    loss = fa.BCO(beta=BETA)
    learn(judged((1.0, 3.0)), loss, normalizer=4)
    out = learn(judged((5.0, 7.0)), loss, normalizer=4)
    assert float(out.metrics["delta"]) == pytest.approx(BETA * 4)
    assert float(out.loss.detach()) == pytest.approx((cost(BETA * 1) + cost(-BETA * 3)) / 4)


def test_m0_and_sigma_follow_the_steps():
    """The first step's own; then a fifth of the way to each later one's."""
    loss = fa.BetaDPO(keep=1.0, ema=0.8)
    assert total(loss) == [0.0, 0.0, 0.0]
    m0, sigma = statistics.fmean(STEPS[0]), statistics.pstdev(STEPS[0])
    for margins in STEPS:
        mean, deviation = statistics.fmean(margins), statistics.pstdev(margins)
        out = learn(pairs(margins), loss)
        beta = max(0.1 * (1 + 0.6 * (mean - m0)), 1e-3)
        want = statistics.fmean(cost(beta * d) for d in margins)
        assert float(out.loss.detach()) == pytest.approx(want, rel=1e-9)
        m0, sigma = 0.8 * m0 + 0.2 * mean, 0.8 * sigma + 0.2 * deviation
        assert total(loss) == pytest.approx([m0, sigma, 1.0], rel=1e-9)


SPLITS = {"even": (2, 2, 2), "uneven": (1, 3, 2), "one by one": (1,) * 6, "gap": (2, 0, 4)}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("kind", ["number", "dict", "tensor"])
def test_micro_batches_move_the_state_once_when_the_step_is_complete(split: tuple[int, ...], kind: str):
    count: Any = {"number": 6, "dict": {"pairs": 6}, "tensor": {"pairs": torch.tensor(6)}}[kind]
    loss, whole = fa.BetaDPO(keep=0.5), fa.BetaDPO(keep=0.5)
    for margins in ((3.0, -0.5, 1.0, 0.25, 2.0, 7.0), (5.0, -1.0, 0.5, -2.0, 0.0, 1.0)):
        before, places = total(loss), iter(margins)
        for number, size in enumerate(split):
            assert total(loss) == before, f"moved before micro-batch {number}"
            learn(pairs(tuple(itertools.islice(places, size))), loss, normalizer=count)
        learn(pairs(margins), whole)
        assert total(loss) == pytest.approx(total(whole), rel=1e-12)
        assert total(loss) != before and not loss.state_dict()["pending"].any()


def test_without_a_normalizer_every_call_is_a_step():
    loss, means = fa.BetaDPO(keep=1.0, ema=0.5), []
    for margins in STEPS:
        learn(pairs(margins[:2]), loss)
        means.append(statistics.fmean(margins[:2]))
    m0 = ((means[0] + means[1]) / 2 + means[2]) / 2
    assert total(loss)[0] == pytest.approx(m0)


def test_scoring_does_not_move_it(loss: fa.Loss):
    learn(both(STEPS[0]), loss)
    before, case = flat(loss.state_dict()), both(STEPS[1])
    with torch.no_grad():
        first = fa.align_loss(case.hidden, case.weight, case.batch(), loss)
        again = fa.align_loss(case.hidden, case.weight, case.batch(), loss)
    assert flat(loss.state_dict()) == before
    assert first.loss == again.loss
    learn(case, loss)
    assert flat(loss.state_dict()) != before


@pytest.mark.parametrize("wrong", ["ref_logp", "target", "normalizer"])
def test_a_call_that_raises_does_not_move_it(loss: fa.Loss, wrong: str):
    learn(both(STEPS[0]), loss)
    before, case, options = flat(loss.state_dict()), both(STEPS[1]), {}
    if wrong == "ref_logp":
        del case.columns["ref_logp"]
    elif wrong == "target":
        case.target[-1] = 4  # of four words
    else:
        options["normalizer"] = {"pairs": -1, "sequences": -1, "tokens": -1}
    with pytest.raises(ValueError, match=wrong):
        learn(case, loss, **options)
    assert flat(loss.state_dict()) == before


@pytest.mark.parametrize("name", ["bco", "betadpo"])
def test_a_batch_that_diverged_is_not_remembered(name: str):
    loss, case = copy.deepcopy(LOSSES[name]), both(STEPS[1])
    learn(both(STEPS[0]), loss)
    before = total(loss)
    case.hidden[0] = math.nan
    assert learn(case, loss).loss.isnan() and total(loss) == before


def test_a_step_that_diverged_in_part_is_over_all_the_same():
    loss, bad = fa.BetaDPO(), pairs(STEPS[1])
    bad.hidden[0] = math.nan
    for case in (bad, pairs(STEPS[2])):
        learn(case, loss, normalizer=8)
    assert not loss.state_dict()["pending"].any()


def test_a_part_that_raises_does_not_move_the_others():
    loss = fa.Sum([(1.0, fa.BCO()), (1.0, fa.KTO())])
    with pytest.raises(ValueError, match=r"KTO.*kl"):
        learn(judged(STEPS[0]), loss)
    assert total(loss.losses[0][1]) == [0.0, 0.0]


def in_state(m0: float, sigma: float, calls: int = 0, **fields: Any) -> fa.BetaDPO:
    loss = fa.BetaDPO(**fields)
    loss.load_state_dict({"total": tensor(m0, sigma, 1.0), "pending": tensor(0, 0, 0), "calls": calls})
    return loss


def test_draws_are_those_of_the_seed_and_the_number_of_calls():
    margin = torch.linspace(-1, 1, 30).double()
    drawn = []
    for seed, calls in [*itertools.product(range(4), range(4)), (3, 3)]:
        loss = in_state(0.0, 1.0, calls, seed=seed, keep=0.5)
        drawn.append(loss.kept(margin).tolist())
        assert loss.kept(margin).tolist() == drawn[-1]
    assert len({*map(tuple, drawn)}) == 16 and drawn[-1] == drawn[-2]


def test_every_call_draws_anew():
    loss, margin = fa.BetaDPO(keep=0.5), torch.linspace(-1, 1, 30).double()
    drawn = []
    for _ in range(3):
        drawn.append(tuple(loss.kept(margin).tolist()))
        learn(pairs(STEPS[0]), loss, normalizer=12)  # a step under way counts too
    assert len({*drawn}) == 3


@pytest.mark.parametrize("keep", [0.01, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_how_many_are_kept(keep: float, count: int):
    kept = fa.BetaDPO(keep=keep).kept(torch.linspace(-3, 9, count).double()).tolist()
    assert len(kept) == max(1, round(keep * count))
    assert kept == sorted({*kept}) and {*kept} <= {*range(count)}


def inclusion(weights: list[float], size: int) -> list[float]:
    """The probability of each to be among `size` draws without replacement, over all orders."""
    found = [0.0] * len(weights)
    for order in itertools.permutations(range(len(weights)), size):
        chance, left = 1.0, sum(weights)
        for i in order:
            chance, left = chance * weights[i] / left, left - weights[i]
        for i in order:
            found[i] += chance
    return found


@pytest.mark.parametrize("varied", ["seed", "calls", "first step"])
def test_pairs_are_kept_as_often_as_their_weights_say(varied: str):
    """Draws without replacement with weights exp(-(D - M0)^2 / (2 sigma^2)), in 3000 of them."""
    margins, draws = [0.5, 1.5, -0.7, 2.2, 0.1], 3000
    m0, sigma = statistics.fmean(margins), statistics.pstdev(margins)  # in the first step, the batch's own
    if varied != "first step":
        m0, sigma = 0.5, 0.8
    weights = [math.exp(-((d - m0) ** 2) / (2 * sigma**2)) for d in margins]
    hits = torch.zeros(len(margins))
    for number in range(draws):
        calls, seed = (number, 1) if varied == "calls" else (0, number)
        fresh = fa.BetaDPO(seed=seed, keep=0.4)
        loss = fresh if varied == "first step" else in_state(m0, sigma, calls, seed=seed, keep=0.4)
        hits[loss.kept(tensor(*margins))] += 1
    for hit, chance in zip(hits.tolist(), inclusion(weights, 2), strict=True):
        assert abs(hit / draws - chance) <= 4 * math.sqrt(chance * (1 - chance) / draws)


def test_outliers_are_the_last_to_be_kept():
    margin = tensor(1.0, 900.0, 1.1, -800.0, 0.9)
    for seed in range(50):
        assert in_state(1.0, 0.5, seed=seed, keep=0.6).kept(margin).tolist() == [0, 2, 4]
        assert in_state(1.0, 0.0, seed=seed, keep=0.2).kept(margin).tolist() == [0]  # no spread at all
    drawn = [in_state(1.0, 0.0, seed=seed, keep=0.2).kept(torch.ones(5).double()) for seed in range(50)]
    assert {int(kept) for kept in drawn} == {*range(5)}


def test_a_restored_loss_goes_on_bit_by_bit(loss: fa.Loss, tmp_path: Path):
    """From the middle of a step, through a file that is read without pickle."""
    fresh = copy.deepcopy(loss)
    units = {"pairs": 8, "sequences": 16, "tokens": 16}
    learn(both(STEPS[0]), loss)
    learn(both(STEPS[1]), loss, normalizer=units)
    torch.save(loss.state_dict(), tmp_path / "state.pt")
    restored = copy.deepcopy(fresh)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert flat(restored.state_dict()) == flat(loss.state_dict())
    later = [(both(STEPS[2]), units), (both(STEPS[0]), None), (both(STEPS[1]), None)]
    values = []
    for each in (loss, restored, fresh):
        values.append([float(learn(case, each, normalizer=count).loss.detach()) for case, count in later])
    assert values[1] == values[0] != values[2]
    assert flat(restored.state_dict()) == flat(loss.state_dict()) != flat(fresh.state_dict())


def test_a_saved_state_is_a_copy(loss: fa.Loss):
    learn(both(STEPS[0]), loss)
    saved = loss.state_dict()
    before, other = flat(saved), copy.deepcopy(loss)
    other.load_state_dict(saved)
    for each in (loss, other):
        learn(both(STEPS[1]), each)
        assert flat(each.state_dict()) != before
        assert flat(saved) == before


OTHER = fa.Sum([(1.0, fa.BCO()), (1.0, fa.SFT()), (1.0, fa.BCO())])  # than LOSSES["sum"], in its last part
REFUSED: dict[str, tuple[fa.Loss, fa.Loss, str]] = {
    "bco of betadpo": (LOSSES["bco"], LOSSES["betadpo"], r"expected total \[2\].*another loss\?"),
    "bco of dpo": (LOSSES["bco"], fa.DPO(), r"expected total \[2\].*got \[\].*another loss\?"),
    "bco of a sum": (LOSSES["bco"], LOSSES["sum"], r"expected total \[2\].*got \['0', '2'\].*another loss\?"),
    "dpo of bco": (fa.DPO(), LOSSES["bco"], r"DPO.*keeps no state; got \['calls'.*another loss\?"),
    "a sum of bco": (LOSSES["sum"], LOSSES["bco"], r"Sum.*parts \['0', '2'\]; got.*another loss\?"),
    "a sum of another": (LOSSES["sum"], LOSSES["nested"], r"Sum.*parts \['0', '2'\]; got \['1'\]"),
    "a part of another": (LOSSES["sum"], OTHER, r"expected total \[3\].*another loss\?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_state_of_another_loss_is_refused(case: str):
    loss, other, says = (copy.deepcopy(x) if isinstance(x, fa.Loss) else x for x in REFUSED[case])
    if not isinstance(loss, fa.DPO):
        learn(both(STEPS[0]), loss)
    before = flat(loss.state_dict())
    with pytest.raises(ValueError, match=rf"(?s){says}"):
        loss.load_state_dict(other.state_dict())
    assert flat(loss.state_dict()) == before


def test_equality_hash_and_text_ignore_it(loss: fa.Loss):
    fresh = copy.deepcopy(loss)
    learn(both(STEPS[0]), loss)
    assert flat(loss.state_dict()) != flat(fresh.state_dict())
    assert loss == fresh and hash(loss) == hash(fresh) and repr(loss) == repr(fresh)
    assert fa.BCO(beta=0.2) != fa.BCO(beta=0.3) and fa.BetaDPO(seed=1) != fa.BetaDPO()


@pytest.mark.parametrize("loss", [fa.BCO(beta=BETA), fa.BetaDPO(keep=0.5)], ids=lambda loss: loss.name)
def test_a_replaced_or_a_second_loss_starts_anew(loss: fa.Loss):
    initial = flat(type(loss)().state_dict())
    learn(both(STEPS[0]), loss)
    mine = flat(loss.state_dict())
    for other in (replace(loss), replace(loss, beta=0.3), type(loss)()):
        assert flat(other.state_dict()) == initial != mine
        learn(both(STEPS[1]), other)
        assert flat(loss.state_dict()) == mine


def test_a_sum_is_its_parts():
    bco, beta_dpo = fa.BCO(beta=BETA), fa.BetaDPO(keep=0.5)
    loss = fa.Sum([(1.0, fa.BCO(beta=BETA)), (2.0, fa.BetaDPO(keep=0.5))])
    for step in STEPS:
        out = learn(both(step), loss)
        parts = [float(learn(both(step), part).loss.detach()) for part in (bco, beta_dpo)]
        assert float(out.loss.detach()) == pytest.approx(parts[0] + 2 * parts[1], rel=1e-12)
    assert flat(loss.state_dict()) == flat({"0": bco.state_dict(), "1": beta_dpo.state_dict()})
    assert fa.Sum([(1.0, fa.DPO()), (1.0, fa.SFT())]).state_dict() == {}


def as_rank(rank: int, folder: str) -> None:
    """Three steps with half of each on this rank, in two micro-batches; BCO's in one."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    bco, beta_dpo, values = fa.BCO(beta=BETA), fa.BetaDPO(keep=1.0), []
    for step in STEPS:
        mine = step[2 * rank : 2 * rank + 2]
        values.append(float(learn(judged(mine), bco, normalizer=4).loss.detach()))
        for margin in mine:
            values.append(float(learn(pairs((margin,)), beta_dpo, normalizer=4).loss.detach()))
    learn(pairs(STEPS[0] if rank else ()), beta_dpo, normalizer=4)  # a rank without any
    found = {"bco": bco.state_dict(), "betadpo": beta_dpo.state_dict(), "values": values}
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_keep_the_state_of_one(tmp_path: Path):
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=as_rank, args=(rank, str(tmp_path))) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    bco, beta_dpo = fa.BCO(beta=BETA), fa.BetaDPO(keep=1.0)
    for number, step in enumerate(STEPS):
        values = [state["values"][3 * number : 3 * number + 3] for state in found]
        assert values[0][0] + values[1][0] == pytest.approx(float(learn(judged(step), bco).loss.detach()))
        m0 = total(beta_dpo)[0]
        for place, margin in enumerate(step):  # a micro-batch of one pair each, of both ranks at a time
            point = (step[place % 2] + step[place % 2 + 2]) / 2 if number == 0 else m0
            want = cost(max(0.1 * (1 + 0.6 * (margin - point)), 1e-3) * margin) / 4
            assert values[place // 2][1 + place % 2] == pytest.approx(want)
        learn(pairs(step), beta_dpo)
    learn(pairs(STEPS[0]), beta_dpo)
    for state in found:
        assert state["bco"]["total"].tolist() == pytest.approx(total(bco), rel=1e-12)
        assert state["betadpo"]["total"].tolist() == pytest.approx(total(beta_dpo), rel=1e-12)
        assert not state["betadpo"]["pending"].any()


def test_the_default_device_is_not_asked():
    """What is drawn, remembered or held on the way lies where the tensors are."""
    case = pairs(STEPS[0])
    want = learn(case, fa.BetaDPO(keep=0.5)).loss
    fa.release_workspace()
    torch.set_default_device("meta")
    try:
        got = learn(case, fa.BetaDPO(keep=0.5)).loss
    finally:
        torch.set_default_device("cpu")
    assert torch.equal(got, want)
