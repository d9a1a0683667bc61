"""Which implementation of an attention ran: each says so where it starts, and whoever measures listens.

A name that was asked for proves nothing: `auto` may have taken another form, and an optional package may be absent, or
fail on this machine: then it is tried once, and left out.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_listeners: list[dict[str, int]] = []


def ran(kernel: str) -> None:
    """Say that this implementation runs. Costs next to nothing while nobody listens."""
    for listener in _listeners:
        listener[kernel] = listener.get(kernel, 0) + 1


@contextmanager
def kernels() -> Iterator[dict[str, int]]:
    """Within the context, what ran and how often.

    >>> with kernels() as seen:
    ...     ran("chunked")
    >>> seen
    {'chunked': 1}
    """
    seen: dict[str, int] = {}
    _listeners.append(seen)
    try:
        yield seen
    finally:
        _listeners.remove(seen)


@contextmanager
def trial() -> Iterator[None]:
    """For a kernel that is tried, its gradients too, in the midst of whatever the caller does: inference, or a forward
    pass whose activations somebody saves elsewhere."""

    def itself(x: torch.Tensor) -> torch.Tensor:
        return x

    with torch.inference_mode(False), torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(itself, itself):
        yield
