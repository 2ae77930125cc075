"""Losses on pairs that compare all of a batch: no gradient is known before its end."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..batch import Batch
from .preference import DPO, PairLoss, check_flipped, smoothed
from .state import State, all_reduced, zeros

_DRAWS = torch.Generator()  # seeded before each draw; torch.compile could not trace its making before 2.13


@dataclass(frozen=True)
class AOT(PairLoss):
    """Alignment by optimal transport: -(1-e) log s(beta d) - e log s(-beta d) of sorted differences,

        paired      d = sort(log pi(y_w) - log pi(y_l)) - sort(log ref(y_w) - log ref(y_l))
        unpaired    d = sort(L_w) - sort(L_l)

    over the pairs of the batch: the distribution of the chosen is to dominate that of the rejected. Under
    Humanline log pi is log ref plus the clipped log-ratio. Source: arXiv 2406.05882.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2], [3], [4]]), ref_logp=torch.zeros(4, 1)).live()
    >>> fa.AOT(beta=1.0, paired=False).items(torch.zeros(4), torch.tensor([3.0, 1.0, 1.0, 3.0]), batch)
    tensor([0.6931, 0.6931])
    """

    beta: float = 0.01
    label_smoothing: float = 0.0
    paired: bool = True

    paper = "2406.05882"
    item = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flipped(self.name, self.label_smoothing)

    def items(self, logp: Tensor, log_ratio: Tensor, batch: Batch) -> Tensor:
        if not self.paired:
            score = batch.sum(log_ratio)
            return self.pair(batch.chosen(score).sort().values, batch.rejected(score).sort().values, batch)
        ref = batch.need("ref_logp", self.name).to(logp.dtype)
        sums = batch.sum(ref + log_ratio), batch.sum(ref)
        policy, reference = (batch.chosen(x) - batch.rejected(x) for x in sums)
        return self.pair(policy.sort().values, reference.sort().values, batch)

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        return smoothed(self.beta * (chosen - rejected), self.label_smoothing)


@dataclass(frozen=True)
class BetaDPO(PairLoss):
    """DPO with a beta for each batch, and outliers left out: -log s(beta_b D) over the pairs that are kept.

        beta_b = max(beta (1 + a (mean_kept D - M0)), 1e-3), without gradient

    A share `keep` of the pairs is drawn without replacement, with weights exp(-(D - M0)^2 / (2 sigma^2)). M0
    and sigma are averages of the mean and the standard deviation of D over optimizer steps (factor `ema`, all
    ranks), as they were before this step; in the first step, the batch's own. They are state of the loss, for
    the checkpoint (`state_dict`). Draws are those of `seed` and the number of batches seen.
    Source: arXiv 2407.08639. The authors' code moves the averages before it uses them, and with every
    micro-batch; then beta_b would depend on how a step is split.

    >>> import torch, fused_align as fa
    >>> batch = fa.Batch(torch.tensor([[1], [2]]), ref_logp=torch.zeros(2, 1)).live()
    >>> fa.BetaDPO().items(torch.zeros(2), torch.tensor([1.0, 1.0]), batch)
    tensor([0.6931])
    """

    beta: float = 0.1
    a: float = 0.6
    keep: float = 0.8
    ema: float = 0.9
    seed: int = 0
    #: M0, sigma, and whether there was a step; of the step under way sum, sum of squares, count
    state: State = field(
        default_factory=lambda: State(zeros(3), zeros(3)), init=False, compare=False, repr=False
    )

    paper = "2407.08639"
    item = "batch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.keep <= 1 or not 0 <= self.ema < 1:
            raise ValueError(
                f"BetaDPO: keep must be a share of the pairs, in (0, 1], and ema in [0, 1); got {self.keep} "
                f"and {self.ema}."
            )

    def plain(self) -> DPO:
        return DPO(beta=self.beta)

    def kept(self, margin: Tensor) -> Tensor:  # [P] -> [k] int64
        """Which pairs of the next batch are kept, given their D."""
        return self._draw(margin, *self._expected(margin))

    def _draw(self, margin: Tensor, m0: Tensor, sigma: Tensor) -> Tensor:
        log_weight = -(margin.double() - m0).square() / (2 * sigma.square()).clamp(min=1e-12)
        generator = _DRAWS.manual_seed(self.seed * 1_000_003 + self.state.calls)
        uniform = torch.rand(margin.numel(), generator=generator, dtype=torch.float64, device="cpu")
        uniform = uniform.to(margin.device, non_blocking=True)
        # the k largest of log weight + Gumbel noise are k draws without replacement
        order = (log_weight - (-uniform.log()).log()).topk(self._count(margin)).indices
        return order.sort().values

    def _count(self, margin: Tensor) -> int:
        return min(max(1, round(self.keep * margin.numel())), margin.numel())

    def _expected(self, margin: Tensor) -> tuple[Tensor, Tensor]:
        """M0 and sigma, [] each."""
        m0, sigma, known = self.state.at(margin.device).total
        own = _moments(all_reduced(_sums(margin)))
        return torch.where(known > 0, m0, own[0]), torch.where(known > 0, sigma, own[1])

    def pair(self, chosen: Tensor, rejected: Tensor, batch: Batch) -> Tensor:
        margin = chosen - rejected
        known = margin.detach()
        m0, sigma = self._expected(known)  # of a rank without pairs too: it reduces over all of them
        if not margin.numel():
            return margin
        kept = self._draw(known, m0, sigma)
        shift = known[kept].double().mean() - m0
        beta = (self.beta * (1 + self.a * shift)).clamp(min=1e-3).to(margin.dtype)
        share = torch.zeros_like(margin).index_fill_(0, kept, margin.numel() / kept.numel())
        return -share * F.logsigmoid(beta * margin)

    def observe(self, log_ratio: Tensor, batch: Batch, count: float | Tensor) -> None:
        score = self.score(log_ratio, batch)
        state = self.state.at(score.device)
        pending = state.pending + all_reduced(_sums(batch.chosen(score) - batch.rejected(score)))
        # the step is complete when as many pairs were seen as its loss is divided by
        complete = (pending[2] > 0) & (pending[2] >= count)
        mean, deviation = _moments(pending)
        m0, sigma, known = state.total
        ema = self.ema * known  # which is 0 or 1
        moved = torch.stack([ema * m0 + (1 - ema) * mean, ema * sigma + (1 - ema) * deviation, known * 0 + 1])
        # a step that diverged is over like any other, and forgotten
        state.total = torch.where(complete & moved.isfinite().all(), moved, state.total)
        state.pending = torch.where(complete, 0.0, pending)
        state.calls += 1


def _sums(x: Tensor) -> Tensor:  # [P] -> [3]: sum, sum of squares, count
    x = x.detach().double()
    return torch.stack([x.sum(), x.square().sum(), torch.ones_like(x).sum()])


def _moments(sums: Tensor) -> tuple[Tensor, Tensor]:  # mean and standard deviation, of the population
    mean, square = sums[:2] / sums[2].clamp(min=1)
    return mean, (square - mean.square()).clamp(min=0).sqrt()
