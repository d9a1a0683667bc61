"""One token of Hedgehog's causal attention after a state, by `step.c`: see `hhbench.native`."""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hhbench import native
from hhbench.kernels import ran
from hhbench.linear_sum import LinearState, Sums

MANY = 2**20  # values of a state from which other threads would help, and one works here


def hedgehog_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    query_bias: Tensor | None,
    key_bias: Tensor | None,
    *,
    state: LinearState,
) -> tuple[Tensor, Sums] | None:
    """The output [B, H, 1, E] for one token, and the sums after it, or None where this can't serve the tensors.

    Args:
        q, k, v: [B, H, 1, D], [B, G, 1, D], [B, G, 1, E].
        query_weight, key_weight: [heads, D, F / 2]; heads is 1, or that of queries and of states.
        query_bias, key_bias: [heads, 1, F / 2], both or none.
        state: of each query head or of each key-value head. It stays as it is.
    """
    given = q, k, v, query_weight, key_weight, query_bias, key_bias, state.values, state.keys
    if native.observed() or not all(map(_served, given)) or (query_bias is None) != (key_bias is None):
        return None
    whole = [x if x is None or x.is_contiguous() else x.contiguous() for x in given]
    (B, H, _, D), G, (_, S, F, E), (wq_heads, _, half) = q.shape, k.shape[1], state.values.shape, query_weight.shape
    fits = state.values.shape == (B, S, 2 * half, v.shape[3]) and state.keys.shape == (B, S, 2 * half)
    if not fits or S not in (G, H) or key_weight.shape[0] not in (1, S):
        return None  # not this attention's state, or one that is broadcast: the plain form says so or does it
    if half > native.MOST or (B * S * F * E > MANY and torch.get_num_threads() > 1) or (run := compiled()) is None:
        return None
    values, keys, out = state.values.new_empty(B, S, F, E), state.keys.new_empty(B, S, F), v.new_empty(B, H, 1, E)
    run(
        *(None if x is None else x.data_ptr() for x in (*whole, values, keys, out)),
        *(B, H, G, S, D, half, E, wq_heads, key_weight.shape[0]),
    )
    ran("native")
    return out, Sums(values, keys, state.log_max)


def _served(x: Tensor | None) -> bool:
    if x is None:
        return True
    if not x.is_cpu or x.dtype is not torch.float32:
        return False
    return not (x.requires_grad and torch.is_grad_enabled())


@functools.cache
def compiled() -> Callable[..., None] | None:
    library = native.library()
    if library is None:
        return None
    step = library.step
    step.argtypes, step.restype = [ctypes.c_void_p] * 12 + [ctypes.c_long] * 9, None
    found: Callable[..., None] = step
    return found
