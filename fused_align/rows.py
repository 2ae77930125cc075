"""Which rows of a tensor [M, ...] take part: all of them, a list, or a list padded to a fixed length.

A list's length depends on the data, so making one costs a GPU a copy to the host. A caller who can bound it
(`max_live`) gets a padded list instead, whose shape is known without looking.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of tensors [size, ...]. Padding points one past the end: it reads zeros, writes to a spare row."""

    index: slice | Tensor  # [n] int64, rising
    size: int  # M
    valid: Tensor | None = None  # [n] bool; None: no padding

    @classmethod
    def where(cls, mask: Tensor, most: int | None = None) -> Rows:  # mask [M]
        """The rows of mask; with `most` a list of that fixed length, made without a look at the mask.

        Raises:
            ValueError: on a CPU, more rows than `most`. Elsewhere the last ones are left out.
        """
        if most is None:
            index = mask.nonzero().squeeze(1)
            return cls(slice(0, mask.numel()) if index.numel() == mask.numel() else index, mask.numel())
        if mask.device.type == "cpu" and int(mask.sum()) > most:
            raise ValueError(
                f"max_live must be at least the number of live tokens, {int(mask.sum())}; got {most}."
            )
        size = mask.numel()
        length, place = min(most, size), mask.cumsum(0) - 1
        place = torch.where(mask, place, length).clamp(max=length)
        index = torch.full((length + 1,), size, dtype=torch.int64, device=mask.device)
        index.scatter_(0, place, torch.arange(size, device=mask.device))
        index = index[:length]
        valid = torch.arange(length, device=mask.device) < mask.sum()
        return cls(torch.where(valid, index, size), size, valid)

    def __len__(self) -> int:
        return self.index.stop - self.index.start if isinstance(self.index, slice) else self.index.numel()

    @property
    def everything(self) -> bool:
        return isinstance(self.index, slice) and len(self) == self.size

    def take(self, x: Tensor) -> Tensor:  # [M, ...] -> [n, ...]
        """The rows of x; zeros in padding, whatever x holds."""
        if self.valid is None or isinstance(self.index, slice):
            return x[self.index]
        rows = x[self.index.clamp(max=max(self.size - 1, 0))]
        return torch.where(self.valid.view(-1, *(1,) * (x.dim() - 1)), rows, 0)

    def spread(self, values: Tensor, fill: float = 0.0) -> Tensor:  # [n, ...] -> [M, ...]
        """A tensor that has the values at these rows, and `fill` elsewhere."""
        if self.everything:
            return values
        out = values.new_full((self.size + (self.valid is not None), *values.shape[1:]), fill)
        out[self.index] = values
        return out[: self.size]

    def __getitem__(self, places: slice | Tensor) -> Rows:
        """Some of these rows, by their places in the list."""
        if isinstance(self.index, slice) and isinstance(places, slice):
            index: slice | Tensor = slice(self.index.start + places.start, self.index.start + places.stop)
        elif isinstance(self.index, slice):
            index = places + self.index.start
        else:
            index = self.index[places]
        return Rows(index, self.size, None if self.valid is None else self.valid[places])

    def split(self, step: int) -> Iterator[tuple[Rows, slice]]:
        """Parts of at most `step` rows, each with its places in the list."""
        for start in range(0, len(self), step):
            places = slice(start, min(start + step, len(self)))
            yield self[places], places
