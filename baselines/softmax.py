"""Softmax attention: what every other attention is measured against."""

import functools
import logging
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hhbench.attention import (
    Attention,
    check_inputs,
    masked_softmax,
    register_attention,
    repeat_heads,
    visible_keys,
    zero_padding,
)
from hhbench.errors import in_one_line
from hhbench.kernels import ran, trial
from hhbench.window import num_pairs

log = logging.getLogger("hhbench")


@register_attention(paper="Vaswani et al. 2017, eq. 1", cost="N^2 D", recipe="no-transfer")
class Softmax(Attention):
    """weights_ij = exp(scale q_i.k_j) / sum_j exp(scale q_i.k_j).

    Runs torch's scaled_dot_product_attention, or flash-attn where it is installed and works, the tensors are half
    precision on a CUDA device and no key is padded.
    """

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        check_inputs(self.shape, q, k, v, key_mask, positions)
        dropout = self.shape.dropout if self.training else 0.0
        if key_mask is None and flash_attn_serves(q, v):
            ran("flash-attn")
            return _flash_attn(q, k, v, dropout, softmax_scale=self.shape.scale, causal=self.shape.causal)
        ran("sdpa")
        num_queries, num_keys, H = q.shape[2], k.shape[2], q.shape[1]
        visible, blind, causal = None, None, self.shape.causal and num_queries > 1
        if key_mask is not None:
            q, k, v = (zero_padding(x, key_mask) for x in (q, k, v))
        if key_mask is not None or (causal and num_queries < num_keys):
            visible = visible_keys(key_mask, causal=causal, num_queries=num_queries, num_keys=num_keys, device=q.device)
            causal = False
        if key_mask is not None:
            assert visible is not None
            # A query with nothing to see would be 0/0: let it see everything, then zero what it saw.
            blind = ~visible.any(-1, keepdim=True)
            visible = visible | blind
        grouped, options = k.shape[1] < H, {}
        if grouped and num_queries == 1:  # the queries of a group as rows of its head: a long cache is read once
            q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        elif grouped and (q.is_cpu or (visible is None and q.dtype in (torch.float16, torch.bfloat16))):
            options = {"enable_gqa": True}
        elif grouped:  # on a CUDA device, only the kernels of half precision without a mask know groups
            k, v = repeat_heads(k, H), repeat_heads(v, H)
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=causal, dropout_p=dropout, scale=self.shape.scale, **options
        )
        out = out.reshape(out.shape[0], H, num_queries, out.shape[3])
        return out if blind is None else out.masked_fill(blind, 0.0)

    def weights(
        self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        check_inputs(self.shape, q, k, None, key_mask, positions)
        q, k = zero_padding(q, key_mask), zero_padding(k, key_mask)
        scores = q @ repeat_heads(k, self.shape.num_heads).mT * self.shape.scale
        visible = visible_keys(
            key_mask,
            causal=self.shape.causal,
            num_queries=q.shape[2],
            num_keys=k.shape[2],
            device=q.device,
        )
        return masked_softmax(scores, visible)

    def state_bytes(self, num_tokens: int, *, batch_size: int = 1) -> int | None:
        """The key-value cache in float32: it grows with every token."""
        if not self.shape.causal:
            return None
        return batch_size * num_tokens * self.shape.num_kv_heads * self.shape.head_dim * 2 * 4

    def flops(self, num_queries: int, num_keys: int, *, batch_size: int = 1) -> int:
        """The two products over pairs of tokens; the sum of the normaliser, one part in 2 D, is not counted."""
        pairs = num_pairs(num_queries, num_keys, causal=self.shape.causal)
        return batch_size * self.shape.num_heads * pairs * 4 * self.shape.head_dim


def flash_attn_serves(q: Tensor, v: Tensor) -> bool:
    """Whether flash-attn is there for tensors like these. A compiled model has SDPA's kernels."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or torch.compiler.is_compiling():
        return False
    return _flash_attn_works(q.device, q.dtype, q.shape[3], v.shape[3])


@functools.cache
def _flash_attn_works(device: torch.device, dtype: torch.dtype, width: int, value_width: int) -> bool:
    """Tried once, on one token, gradients too: it may be built for another torch, or not for these widths."""
    if find_spec("flash_attn") is None:
        return False
    try:
        with trial():
            q, v = (
                torch.zeros(1, 1, 1, size, device=device, dtype=dtype, requires_grad=True)
                for size in (width, value_width)
            )
            torch.autograd.grad(_flash_attn(q, q, v, 0.0, softmax_scale=1.0, causal=True).sum(), (q, v))
    except Exception as error:  # whatever its build or its checks come to
        log.warning("flash-attn fails here (%s): softmax takes torch's SDPA", in_one_line(error))
        return False
    return True


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, dropout: float, *, softmax_scale: float, causal: bool) -> Tensor:
    """[B, H, N, D] as everywhere here; theirs is [B, N, H, D]."""
    from flash_attn import flash_attn_func

    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out: Tensor = flash_attn_func(q, k, v, dropout, softmax_scale=softmax_scale, causal=causal)
    return out.transpose(1, 2)
