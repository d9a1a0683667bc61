"""Sliding windows: which keys lie near a query, the blocks that keep the work at O(N w), and what decoding keeps.

The distance of a query and a key counts attended tokens, so padding of any kind and place moves no window. A padded
query stands where the last attended token before it stands (bidirectional, before the first: where the first does).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from hhbench.errors import UsageError
from hhbench.state import DecodingState

BLOCK = 64  # queries in a block, at least


def check_window(window: int) -> int:
    if window < 1:
        raise UsageError(f"window must be at least 1, not {window}")
    return window


def near(distance: Tensor, window: int, *, causal: bool) -> Tensor:
    """|i - j| < w; i - w < j <= i if causal."""
    return (distance >= 0) & (distance < window) if causal else distance.abs() < window


def far(distance: Tensor, window: int, *, causal: bool) -> Tensor:
    """The keys that may be seen but are not near."""
    return (distance if causal else distance.abs()) >= window


def num_pairs(num_queries: int, num_keys: int, *, causal: bool, window: int | None = None) -> int:
    """Pairs of a query and a key that may meet: the last `num_queries` of `num_keys` tokens, nearer than a window."""
    window = num_keys if window is None else window

    def up_to(tokens: int) -> int:
        """Pairs of the first tokens with themselves and those before them."""
        few = min(tokens, window)
        return few * (few + 1) // 2 + (tokens - few) * window

    past = up_to(num_keys) - up_to(num_keys - num_queries)
    return past if causal else past + up_to(num_queries) - num_queries


def _places(
    key_mask: Tensor | None, *, causal: bool, num_queries: int, num_keys: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """How many attended tokens precede each query [R, N] and key [R, M]. R is B, or 1 where no key is padded."""
    if key_mask is None:
        keys = torch.arange(num_keys, dtype=torch.int32, device=device)[None]
    else:
        keys = key_mask.cumsum(-1, dtype=torch.int32) - 1
    queries = keys[:, num_keys - num_queries :]
    return (queries if causal else queries.clamp_min(0)), keys  # at -1, a causal query has no key yet


def distances(
    key_mask: Tensor | None,
    *,
    causal: bool,
    num_queries: int,
    num_keys: int,
    device: torch.device,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """i - j for every query and key, [R, N, M], and which keys are attended, [B, 1, M].

    `positions` [B, M] say where the tokens stand if they come in another order.
    """
    if positions is None:
        queries, keys = _places(key_mask, causal=causal, num_queries=num_queries, num_keys=num_keys, device=device)
    else:
        queries, keys = positions[:, num_keys - num_queries :], positions
    return queries[:, :, None] - keys[:, None, :], None if key_mask is None else key_mask[:, None, :]


@dataclass(frozen=True)
class Blocks:
    """Queries in blocks of b, each with the slab of L consecutive attended keys that holds all its windows.

    Slabs overlap. Slab n begins with the first key that the first query of block n has near, so keys before it are
    far from all of the block, and so are those after it.

    Attributes:
        size: b.
        num_queries: N.
        index: which keys a slab takes, int64 [R, n, L]; any key where `inside` is False.
        inside: whether a slab has an attended key there, bool [R, n, L].
        distance: i - j within a block, [R, n, b, L].
        step: how many keys a slab begins, and ends, after the one before it, [R, n - 1]; at most b.
        before: which keys lie before the first slab, bool [R, M].
    """

    size: int
    num_queries: int
    index: Tensor
    inside: Tensor
    distance: Tensor
    step: Tensor
    before: Tensor

    @staticmethod
    def slab_length(window: int, *, causal: bool, num_queries: int, num_keys: int) -> int:
        """L. A window is never wider than the keys are many."""
        window = min(window, num_keys)
        return Blocks._size(window, num_queries) + (window - 1) * (1 if causal else 2)

    @staticmethod
    def _size(window: int, num_queries: int) -> int:
        return min(max(window, BLOCK), num_queries)

    @classmethod
    def of(
        cls,
        key_mask: Tensor | None,
        window: int,
        *,
        causal: bool,
        num_queries: int,
        num_keys: int,
        device: torch.device,
    ) -> "Blocks":
        window = min(window, num_keys)
        size = cls._size(window, num_queries)
        length = cls.slab_length(window, causal=causal, num_queries=num_queries, num_keys=num_keys)
        places, keys = _places(key_mask, causal=causal, num_queries=num_queries, num_keys=num_keys, device=device)
        surplus = -num_queries % size  # the last block is filled up with copies of the last query's place
        places = torch.cat([places, places[:, -1:].expand(-1, surplus)], 1).reshape(places.shape[0], -1, size)
        starts = places[:, :, 0] - (window - 1)
        slabs = starts[:, :, None] + torch.arange(length, dtype=torch.int32, device=device)
        index = slabs.clamp(0, num_keys - 1).long()
        inside = (slabs >= 0) & (slabs <= keys[:, -1, None, None])
        before = keys < starts[:, :1]
        if key_mask is not None:
            attended_first = (~key_mask).to(torch.int8).argsort(dim=-1, stable=True)
            index = attended_first.gather(1, index.flatten(1)).view_as(index)
            before = before & key_mask
        return cls(size, num_queries, index, inside, places[..., None] - slabs[:, :, None], starts.diff(dim=1), before)

    def queries(self, q: Tensor) -> Tensor:
        """[B, H, N, D] -> [B, H, n, b, D]; the last block is filled up with zeros."""
        surplus = -self.num_queries % self.size
        return pad(q, (0, 0, 0, surplus)).reshape(*q.shape[:2], -1, self.size, q.shape[3])

    def keys(self, x: Tensor) -> Tensor:
        """[B, G, M, D] -> [B, G, n, L, D]."""
        B, G, _, D = x.shape
        index = self.index.flatten(1)[:, None, :, None].expand(B, G, -1, D)
        return x.gather(2, index).reshape(B, G, *self.index.shape[1:], D)

    def join(self, out: Tensor) -> Tensor:
        """[B, H, n, b, E] -> [B, H, N, E]."""
        return out.flatten(2, 3)[:, :, : self.num_queries]


@dataclass(frozen=True)
class WindowState(DecodingState):
    """The last w attended tokens of each row, in full from the start: the most recent one lies last.

    Attributes:
        ring_keys: [B, G, w, D]; zero where there was no token yet.
        ring_values: [B, G, w, E].
        num_attended: attended tokens so far, int64 [B].
    """

    ring_keys: Tensor
    ring_values: Tensor
    num_attended: Tensor

    @property
    def filled(self) -> Tensor:
        """Which places of the ring hold a token, bool [B, w]."""
        return _filled(self.num_attended, self.ring_keys.shape[2])

    def before(self, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The ring and then these keys, values and mask: tokens as if nothing had been cut off near them."""
        if key_mask is None:
            key_mask = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
        keys, values = self.ring_keys.to(k.dtype), self.ring_values.to(v.dtype)
        return torch.cat([keys, k], 2), torch.cat([values, v], 2), torch.cat([self.filled, key_mask], 1)


def after_ring(
    state: WindowState | None, k: Tensor, v: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """A state's ring and then these keys, values and mask, and how many tokens were attended to so far, int64 [B]."""
    num_attended = k.new_full((k.shape[0],), k.shape[2], dtype=torch.int64) if key_mask is None else key_mask.sum(-1)
    if state is None:
        return k, v, key_mask, num_attended
    return *state.before(k, v, key_mask), num_attended + state.num_attended


def _filled(num_attended: Tensor, window: int) -> Tensor:
    return torch.arange(window, device=num_attended.device) >= window - num_attended[:, None]


def last_attended(x: Tensor, key_mask: Tensor | None, window: int) -> Tensor:
    """The last w attended tokens of each row of x [B, G, M, D]: [B, G, w, D], zeros first where there are fewer."""
    B, G, M, D = x.shape
    if key_mask is None:
        return pad(x[:, :, max(M - window, 0) :], (0, 0, max(window - M, 0), 0))
    attended_last = key_mask.to(torch.int8).argsort(dim=-1, stable=True)[:, max(M - window, 0) :]
    x = x.gather(2, attended_last[:, None, :, None].expand(B, G, -1, D))
    x = pad(x, (0, 0, max(window - M, 0), 0))
    return x.masked_fill(~_filled(key_mask.sum(-1), window)[:, None, :, None], 0.0)
