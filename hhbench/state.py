"""What a causal attention remembers of the tokens so far, so that decoding need not look at them again."""

import dataclasses
from dataclasses import dataclass
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class DecodingState:
    """Base of every attention's state: a frozen dataclass of tensors whose first dimension is the batch."""

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def select(self, rows: Tensor) -> Self:
        """The states of these rows of the batch, int64 [any]: what beam search asks for."""
        chosen = {name: t.index_select(0, rows.to(t.device)) for name, t in self._tensors().items()}
        return dataclasses.replace(self, **chosen)

    @property
    def batch_size(self) -> int:
        return next(iter(self._tensors().values())).shape[0]

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
