"""Softmax within a sliding window: what local attention alone can do."""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hhbench.attention import (
    Attention,
    MixerShape,
    check_inputs,
    masked_softmax,
    refuse_state_unless_causal,
    register_attention,
    repeat_heads,
    zero_padding,
)
from hhbench.kernels import ran
from hhbench.window import Blocks, WindowState, after_ring, check_window, distances, last_attended, near, num_pairs

DENSE = 2  # with at most so many slabs' keys, all pairs at once are faster


@register_attention(
    paper="Beltagy et al. 2020 (Longformer), section 3.1; Child et al. 2019", cost="N w D", recipe="no-transfer"
)
class SoftmaxWindow(Attention):
    """weights_ij = exp(scale q_i.k_j) / sum_j exp(scale q_i.k_j) over |i - j| < w (causal: i - w < j <= i).

    i and j count attended tokens, whatever `positions` are. A causal window holds w tokens, its own among them, as in
    Mistral. A bidirectional one holds 2 w - 1, which Longformer calls a window of 2 (w - 1), half of it on either side;
    its dilation and its global tokens are not here. Dropout is of the weights, as softmax's is.

    Args:
        window: w. At the number of tokens or above, this is softmax.
    """

    has_state = True

    def __init__(self, shape: MixerShape, *, window: int = 64) -> None:
        super().__init__(shape)
        self.window = check_window(window)

    def forward(  # type: ignore[override]  # a state goes in and comes out on request
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        positions: Tensor | None = None,
        state: WindowState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, WindowState]:
        """See `Attention.forward`, and `Attention.has_state` for the state."""
        check_inputs(self.shape, q, k, v, key_mask, positions)
        if state is not None or return_state:
            refuse_state_unless_causal(self.shape)
        q, k, v = (zero_padding(x, key_mask) for x in (q, k, v))
        k, v, key_mask, num_attended = after_ring(state, k, v, key_mask)
        out = self._attend_near(q, k, v, key_mask)
        if not return_state:
            return out
        ring_keys, ring_values = (last_attended(x, key_mask, self.window) for x in (k, v))
        return out, WindowState(ring_keys, ring_values, num_attended)

    def weights(
        self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        check_inputs(self.shape, q, k, None, key_mask, positions)
        q, k = zero_padding(q, key_mask), zero_padding(k, key_mask)
        visible = self._visible(key_mask, q.shape[2], k.shape[2], q.device)
        return masked_softmax(q @ repeat_heads(k, self.shape.num_heads).mT * self.shape.scale, visible)

    def state_bytes(self, num_tokens: int, *, batch_size: int = 1) -> int | None:
        """Constant in the number of tokens: the keys and values of w tokens in float32, and one counter a sequence."""
        del num_tokens
        if not self.shape.causal:
            return None
        return batch_size * (self.window * self.shape.num_kv_heads * self.shape.head_dim * 2 * 4 + 8)

    def flops(self, num_queries: int, num_keys: int, *, batch_size: int = 1) -> int:
        """As softmax's, over the pairs of the window."""
        pairs = num_pairs(num_queries, num_keys, causal=self.shape.causal, window=self.window)
        return batch_size * self.shape.num_heads * pairs * 4 * self.shape.head_dim

    def _attend_near(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        causal, num_queries, num_keys = self.shape.causal, q.shape[2], k.shape[2]
        length = Blocks.slab_length(self.window, causal=causal, num_queries=num_queries, num_keys=num_keys)
        if num_keys <= DENSE * length:
            ran("dense")
            return self._attend(q, k, v, self._visible(key_mask, num_queries, num_keys, q.device))
        ran("blocks")
        blocks = Blocks.of(
            key_mask, self.window, causal=causal, num_queries=num_queries, num_keys=num_keys, device=q.device
        )
        visible = near(blocks.distance, self.window, causal=causal) & blocks.inside[:, :, None]
        q, k, v = blocks.queries(q), blocks.keys(k), blocks.keys(v)
        visible = visible[:, :, None].expand(q.shape[0], -1, -1, -1, -1)
        q, k, v, visible = (x.flatten(0, 1) for x in (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), visible))
        out = self._attend(q, k, v, visible)
        return blocks.join(out.reshape(-1, blocks.index.shape[1], *out.shape[1:]).transpose(1, 2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        """Softmax over the visible keys; zeros where there is none."""
        blind = ~visible.any(-1, keepdim=True)
        k, v = repeat_heads(k, self.shape.num_heads), repeat_heads(v, self.shape.num_heads)
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=visible | blind,
            dropout_p=self.shape.dropout if self.training else 0.0,
            scale=self.shape.scale,
        )
        return out.masked_fill(blind, 0.0)

    def _visible(self, key_mask: Tensor | None, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
        """Which keys each query may see, [R, 1, N, M]."""
        causal = self.shape.causal
        distance, attended = distances(
            key_mask, causal=causal, num_queries=num_queries, num_keys=num_keys, device=device
        )
        visible = near(distance, self.window, causal=causal)
        return (visible if attended is None else visible & attended)[:, None]
