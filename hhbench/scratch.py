"""Buffers that every chunk of every call writes anew: on a CPU, memory that is fresh each time is not in the cache."""

import threading
from typing import Any

import torch
from torch import Tensor

KEPT_BYTES = 2**26  # of buffers, before they are let go


class Scratch(threading.local):
    """One for each thread. What is in a buffer is read before anything else asks for it.

    Accelerators get new memory each time: their blocks are large, and their allocators keep it.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, name: str, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this shape, 1 to begin with on a CPU: the same one for the same name, shape and type."""
        dtype = dtype or like.dtype
        if like.device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=like.device)
        key = name, shape, dtype
        found = self._made.get(key)
        if found is None:
            if sum(x.nbytes for x in self._made.values()) > KEPT_BYTES:
                self._made.clear()
            with torch.inference_mode(False):  # it outlives the mode that this call is in
                found = self._made[key] = torch.ones(shape, dtype=dtype, device=like.device)
        return found


scratch = Scratch()
