"""Batch: the tokens a loss is computed on, and the only code that knows how they are laid out.

A user's batch is padded (target [B, T]) or packed (target [N] with cu_seqlens [S+1]) and has ignored
positions. `Batch.live()` turns either into the one layout that everything behind `align_loss` sees: packed,
live tokens only, in sequence order. Ignored positions are dropped here, once, by index, so nothing stored in
them (NaN, inf) can reach a value or a gradient.
"""

from __future__ import annotations

import copy
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import Rows

IGNORE_INDEX = -100

_PER_TOKEN = ("old_logp", "ref_logp", "sampler_logp", "token_weight")
_PER_SEQUENCE = ("desirable", "off_policy", "reference", "group")


class Batch:
    """Targets and what the losses need besides the log-probs, with shapes checked once.

    Args:
        target: [B, T], or packed [N] with `cu_seqlens`; int64; -100 is ignored. Already shifted:
            position i of `hidden` predicts `target[i]`. `Batch.from_labels` shifts for you.
        cu_seqlens: [S+1] int, offsets of the packed sequences, from 0 to N.
        old_logp, ref_logp, sampler_logp: target's shape, nats. Log-probs under the policy that sampled, the
            reference model, the sampler's own arithmetic. old_logp=None means on-policy.
        advantage: [S], or per token iff its shape is target's.
        token_weight: target's shape; multiplies what a token contributes to any sum. Counts stay counts.
        margin: [P] reward margin of each pair.
        desirable, off_policy, reference: [S] bool.
        group: [S] int64 prompt ids.
        kl: [] estimate of KTO's reference point z0.

    Pairs: sequence i is chosen and i + S/2 rejected, for i < S/2.

    Raises:
        ValueError, TypeError: a shape or dtype does not fit, in a sentence.
    """

    def __init__(
        self,
        target: Tensor,  # [B, T] | [N]
        *,
        cu_seqlens: Tensor | None = None,  # [S+1]
        old_logp: Tensor | None = None,  # target's shape
        ref_logp: Tensor | None = None,  # target's shape
        sampler_logp: Tensor | None = None,  # target's shape
        advantage: Tensor | None = None,  # [S] | target's shape
        token_weight: Tensor | None = None,  # target's shape
        margin: Tensor | None = None,  # [P]
        desirable: Tensor | None = None,  # [S] bool
        kl: Tensor | None = None,  # []
        off_policy: Tensor | None = None,  # [S] bool
        reference: Tensor | None = None,  # [S] bool
        group: Tensor | None = None,  # [S]
    ) -> None:
        self.target = target
        self.cu_seqlens = cu_seqlens
        self.old_logp = _data(old_logp)
        self.ref_logp = _data(ref_logp)
        self.sampler_logp = _data(sampler_logp)
        self.advantage = _data(advantage)
        self.token_weight = _data(token_weight)
        self.margin = _data(margin)
        self.desirable = desirable
        self.kl = _data(kl)
        self.off_policy = off_policy
        self.reference = reference
        self.group = group
        self.is_live = False
        self.partial = False  # tokens of sequences that are not all there
        self.valid: Tensor | None = None  # [n] bool, of a live batch padded to a fixed length
        self.surplus: Tensor | None = None  # [] bool: whether there were more live tokens than that
        self.stats: dict[str, Tensor] = {}
        self.sequences = self._check()

    @classmethod
    def from_labels(cls, labels: Tensor, **fields: Tensor | None) -> Batch:  # labels [B, T]
        """A batch from Hugging Face labels: [B, T], unshifted, -100 where there is no loss.

        Keeps the shape [B, T] by shifting left; the last target of every row is -100. The other fields are
        given in the shifted alignment, as for the constructor.
        """
        if labels.dim() != 2:
            raise ValueError(
                f"Batch.from_labels: labels must be [B, T]; got {list(labels.shape)}. "
                "For packed sequences shift inside each sequence and call Batch(target, cu_seqlens=...)."
            )
        target = torch.full_like(labels, IGNORE_INDEX)
        target[:, :-1] = labels[:, 1:]
        return cls(target, **fields)

    def _check(self) -> int:
        """Checks every field against the layout; returns the number of sequences S."""
        target = self.target
        for name in ("target", "cu_seqlens"):
            field = getattr(self, name)
            if not isinstance(field, Tensor) and (field is not None or name == "target"):
                raise TypeError(f"Batch: {name} must be a torch.Tensor; got {type(field).__name__}.")
        if target.dtype != torch.int64:
            raise TypeError(f"Batch: target must be int64; got {target.dtype}. Call target.long().")
        if target.dim() == 2:
            if self.cu_seqlens is not None:
                raise ValueError(
                    f"Batch: target [B, T] = {list(target.shape)} is padded, so cu_seqlens must be None. "
                    "For packed sequences pass target as [N]."
                )
            S = target.shape[0]
        elif target.dim() == 1 and self.cu_seqlens is not None:
            self._check_offsets(self.cu_seqlens, target.numel())
            S = self.cu_seqlens.numel() - 1
        else:
            raise ValueError(
                f"Batch: target must be padded [B, T], or packed [N] with cu_seqlens [S+1]; got "
                f"{list(target.shape)} and cu_seqlens={'given' if self.cu_seqlens is not None else None}."
            )
        for name in _PER_TOKEN:
            self._check_shape(name, tuple(target.shape), "target's shape")
        for name in _PER_SEQUENCE:
            self._check_shape(name, (S,), "[S]")
        for name in ("desirable", "off_policy", "reference"):
            field = getattr(self, name)
            if field is not None and field.dtype != torch.bool:
                raise TypeError(f"Batch: {name} must be bool; got {field.dtype}. Call {name}.bool().")
        if self.group is not None and self.group.dtype != torch.int64:
            raise TypeError(f"Batch: group must be int64 prompt ids; got {self.group.dtype}.")
        self.advantage_per_token = getattr(self.advantage, "shape", None) == target.shape
        if not self.advantage_per_token:
            self._check_shape("advantage", (S,), "[S], or target's shape for one advantage per token")
        elif (
            target.shape == (S,) and self.cu_seqlens is not None and bool((self.cu_seqlens.diff() != 1).any())
        ):
            raise ValueError(
                f"Batch: advantage [{S}] could be one per sequence or per token: there are as many tokens as "
                "sequences. Append an ignored token (target -100) to say which."
            )
        if self.margin is not None:
            self._check_shape("margin", (S // 2,), "[P] with P = S/2 pairs")
        if self.kl is not None:
            self._check_shape("kl", (), "[] (a scalar tensor)")
        return S

    def _check_shape(self, name: str, expected: tuple[int, ...], meaning: str) -> None:
        field = getattr(self, name)
        if field is None:
            return
        if not isinstance(field, Tensor):
            raise TypeError(f"Batch: {name} must be a Tensor or None; got {type(field).__name__}.")
        if field.device != self.target.device:
            raise ValueError(f"Batch: {name} is on {field.device}, target on {self.target.device}; move one.")
        if tuple(field.shape) != expected:
            raise ValueError(
                f"Batch: {name} must be {meaning} = {list(expected)} to match target "
                f"{list(self.target.shape)}; got {list(field.shape)}."
            )

    @staticmethod
    def _check_offsets(cu_seqlens: Tensor, tokens: int) -> None:
        if cu_seqlens.dim() != 1 or cu_seqlens.numel() == 0 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"Batch: cu_seqlens must be [S+1] integers; got {list(cu_seqlens.shape)} {cu_seqlens.dtype}."
            )
        if cu_seqlens.device.type == "cpu":  # elsewhere reading it would stall the device
            offsets = cu_seqlens.tolist()
            if offsets[0] != 0 or offsets[-1] != tokens or sorted(offsets) != offsets:
                raise ValueError(
                    f"Batch: cu_seqlens must rise from 0 to N = {tokens}; got {offsets[:3]} ... "
                    f"{offsets[-1]}."
                )

    # ---- what the layout says, for any batch -------------------------------------------------------------

    @cached_property
    def rows(self) -> Tensor:
        """[n] int64: the live positions, as rows of the flattened target (and hidden), rising."""
        return (self.target.reshape(-1) != IGNORE_INDEX).nonzero().squeeze(1)

    @cached_property
    def sequence(self) -> Tensor:
        """[n] int64: the sequence that each live token belongs to."""
        if self.target.dim() == 2:
            return self.rows // max(self.target.shape[1], 1)
        assert self.cu_seqlens is not None
        return torch.bucketize(self.rows, self.cu_seqlens[1:].long(), right=True)

    @cached_property
    def lengths(self) -> Tensor:
        """[S] int64: live tokens of each sequence."""
        zeros = torch.zeros(self.sequences + 1, dtype=torch.int64, device=self.target.device)
        return zeros.index_add_(0, self.sequence, torch.ones_like(self.sequence))[:-1]

    @cached_property
    def position(self) -> Tensor:
        """[n] int64: how many live tokens of its sequence stand before each; of whole sequences only."""
        if self.partial:
            raise ValueError(
                'Batch.position: these tokens are parts of sequences. Give the loss item="sequence".'
            )
        starts = self.lengths.cumsum(0) - self.lengths
        return torch.arange(self.target.numel(), device=self.target.device) - self.spread(starts)

    @property
    def pairs(self) -> int:
        """P. Raises ValueError if the sequences do not come in pairs."""
        if self.sequences % 2:
            raise ValueError(
                f"Batch: pairs need an even number of sequences, chosen first and rejected second; got "
                f"{self.sequences}."
            )
        return self.sequences // 2

    def count(self, unit: str) -> int | Tensor:
        """How many "tokens" (live), "sequences" (with or without live tokens), "pairs" or "groups" there are.

        A tensor [] where the host does not know: the groups, and the tokens of a batch of fixed length.
        """
        if unit == "tokens":
            return self.rows.numel() if self.valid is None else self.valid.sum()
        if unit == "sequences":
            return self.sequences
        if unit == "pairs":
            return self.pairs
        if unit == "groups":
            ordered = self.need("group", "A loss per group").sort().values
            return (ordered.diff() != 0).sum() + min(self.sequences, 1)
        raise ValueError(
            f'Batch.count: unit must be "tokens", "sequences", "pairs" or "groups"; got {unit!r}.'
        )

    # ---- the live view, and parts of it ------------------------------------------------------------------

    def live(self, most: int | None = None) -> Batch:
        """The same batch, packed, with live tokens only: per-token fields are [n], target included.

        `rows` still points into the original flattened hidden. With `most` there are that many tokens,
        whatever the data: behind the live ones come some of a sequence that is none, with zeros in every
        field and in `valid`; sums, means and weights leave them out.
        """
        if self.is_live:
            return self
        if most is not None:
            found = Rows.where(self.target.reshape(-1) != IGNORE_INDEX, most)
            assert isinstance(found.index, Tensor)
            self = copy.copy(self)
            self.rows, self.valid = found.index, found.valid
            self.surplus = (self.target != IGNORE_INDEX).sum() > most
            for name in ("sequence", "lengths"):
                self.__dict__.pop(name, None)
        return self._take(self.rows, self.rows, self.sequence, self.lengths)

    def take_tokens(self, index: Tensor) -> Batch:  # [k] positions among the live tokens
        """Some tokens of a live batch; whatever is per sequence stays whole, `lengths` included."""
        part = self._take(index, self.rows[index], self.sequence[index], self.lengths)
        part.partial = True
        return part

    def take_pairs(self, index: Tensor, size: int | None = None) -> tuple[Batch, Tensor]:  # [k] pair numbers
        """Some pairs of a live batch, and their tokens' positions [m] in it; size: m, where it is known."""
        part, tokens = self.take_sequences(torch.cat([index, index + self.pairs]), size)
        part.margin = None if self.margin is None else self.margin[index]
        return part, tokens

    def take_sequences(self, index: Tensor, size: int | None = None) -> tuple[Batch, Tensor]:  # [k] numbers
        """Some whole sequences of a live batch, in this order, and their tokens' positions [m] in it."""
        lengths = self.lengths[index]
        starts = self.lengths.cumsum(0)[index] - lengths
        shift = starts - (
            lengths.cumsum(0) - lengths
        )  # from a token's place in the part to its place in self
        sequence = torch.repeat_interleave(lengths, output_size=size)
        tokens = shift[sequence] + torch.arange(sequence.numel(), device=sequence.device)
        part = self._take(tokens, self.rows[tokens], sequence, lengths)
        part.sequences = index.numel()
        for name in self._per_sequence():
            field = getattr(self, name)
            setattr(part, name, None if field is None else field[index])
        part.margin = None
        return part, tokens

    def _take(self, flat: Tensor, rows: Tensor, sequence: Tensor, lengths: Tensor) -> Batch:
        """A live batch of the tokens that stand at `flat` in this batch's flattened per-token fields."""
        part = copy.copy(self)
        part.__dict__.pop("position", None)
        part.valid = self.valid if self.valid is None or not self.is_live else self.valid[flat]
        chosen = Rows(flat, self.target.numel(), part.valid)
        part.target = chosen.take(self.target.reshape(-1))
        for name in self._per_token():
            field = getattr(self, name)
            setattr(part, name, None if field is None else chosen.take(field.reshape(-1)))
        part.cu_seqlens = None
        part.is_live = True
        # the cached layout of the part, known without another look at the targets
        part.rows, part.sequence, part.lengths = rows, sequence, lengths
        return part

    def _per_token(self) -> tuple[str, ...]:
        return (*_PER_TOKEN, "advantage") if self.advantage_per_token else _PER_TOKEN

    def _per_sequence(self) -> tuple[str, ...]:
        return _PER_SEQUENCE if self.advantage_per_token else (*_PER_SEQUENCE, "advantage")

    # ---- what losses use; on a live batch -----------------------------------------------------------------

    def sum(self, x: Tensor, *, weighted: bool = True) -> Tensor:  # [n] -> [S]
        """Sum of x over the tokens of each sequence, weighted by `token_weight` if given.

        Adds in float64: float32 would lose digits of a log-prob summed over thousands of tokens.
        """
        if weighted and self.token_weight is not None:
            x = x * self.token_weight.to(x.dtype)
        return added_at(self.sequences + 1, self.sequence, x.double())[:-1].to(x.dtype)

    def mean(self, x: Tensor, *, weighted: bool = True) -> Tensor:  # [n] -> [S]
        """`sum(x)` divided by the number of live tokens; 0 for a sequence without any."""
        return self.sum(x, weighted=weighted) / self.lengths.clamp(min=1).to(x.dtype)

    def spread(self, x: Tensor) -> Tensor:  # [S] -> [n]
        """The value of its sequence, for every token; 1 in padding, where a length would divide."""
        if self.valid is None:
            return x[self.sequence]
        return torch.where(self.valid, x[self.sequence.clamp(max=self.sequences - 1)], 1)

    def group_sum(self, x: Tensor) -> Tensor:  # [S] -> [S]
        """The sum over all sequences of its group, for every sequence."""
        index = numbered(self.need("group", "A loss per group"))
        return added_at(self.sequences, index, x)[index]

    def token_mean(self, x: Tensor) -> Tensor:  # [n] -> []
        """The mean over live tokens, for metrics."""
        if self.valid is None:
            return x.mean()
        return torch.where(self.valid, x, 0).sum() / self.valid.sum()

    def stat(self, name: str, who: str) -> Tensor:  # -> [n]
        """A statistic of the tokens besides logp: "entropy", "lse", "average" (mean logit) or "squares".

        There are those that the loss names in `reads`, differentiable if in `learnt`.
        """
        if name not in self.stats:
            raise ValueError(
                f"{who} takes {name!r} of the tokens, and its `reads` names {sorted(self.stats)}; "
                "add it there."
            )
        return self.stats[name]

    def with_stats(self, stats: dict[str, Tensor]) -> Batch:
        part = copy.copy(self)
        part.stats = stats
        return part

    def chosen(self, x: Tensor) -> Tensor:  # [S] -> [P]
        return x[: self.pairs]

    def rejected(self, x: Tensor) -> Tensor:  # [S] -> [P]
        return x[self.pairs :]

    def need(self, name: str, who: str) -> Tensor:
        """The field `name`, or a ValueError that says who needs it."""
        field = getattr(self, name)
        if field is None:
            raise ValueError(f"{who} needs Batch({name}=...); got None.")
        return field

    def token_advantage(self, who: str) -> Tensor:
        """[n]: the advantage of each token, whether it was given per token or per sequence."""
        advantage = self.need("advantage", who)
        return advantage if self.advantage_per_token else self.spread(advantage)


def added_at(size: int, index: Tensor, x: Tensor) -> Tensor:  # [n] -> [size]
    """The sums of x by index, in the same order every time: index_add's order on a GPU is one of chance."""
    zeros = torch.zeros(size, dtype=x.dtype, device=x.device)
    if x.device.type == "cpu":
        return zeros.index_add(0, index, x)
    return zeros.index_put((index,), x, accumulate=True)


def numbered(group: Tensor) -> Tensor:  # [S] int64 -> [S] int64
    """Groups of any ids, numbered from 0. torch.unique does it too, and waits for the device."""
    ordered, order = group.sort()
    return torch.empty_like(group).scatter_(0, order, F.pad((ordered.diff() != 0).cumsum(0), (1, 0)))


def _data(field: Tensor | None) -> Tensor | None:
    """A column is data: nothing is differentiated with respect to it, whichever plan runs."""
    return field.detach() if isinstance(field, Tensor) else field
