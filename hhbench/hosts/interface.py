"""transformers' attention and mask interfaces: what a converted model calls in place of its own."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from hhbench.errors import HHBenchError, UsageError
from hhbench.hosts.slots import SLOT, CrossAttentionSlot

INTERFACE = "hhbench"
HARMLESS = {  # keywords that reach the attention on their way to something else
    "deterministic",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "use_cache",
}
MEANINGS = {
    "softcap": "a soft cap on the scores",
    "s_aux": "attention sinks",
    "position_bias": "a bias on the scores",
}

MaskFunction = Callable[..., Tensor]  # (batch, head, query, key) indices -> whether the query sees the key


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions [B, N] for a decoder: they count attended tokens, so left padding changes nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,  # the attention applies its own, read off the host when it was converted
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    output_attentions: bool | None = None,
    **other: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in place of its own attention: q [B, H, N, D] in, [B, N, H, E] out."""
    refuse_unknown(module, attention_mask, other)
    name, slot = type(module).__name__, getattr(module, SLOT, None)
    if slot is None:
        raise HHBenchError(f"{name} has no hhbench attention: use hhbench.convert or hhbench.load")
    shape = slot.placement.shape
    if is_causal is not None and is_causal != shape.causal:
        raise HHBenchError(f"{name} asks for is_causal={is_causal}; it was converted as {shape.direction}")
    if scaling is not None and abs(scaling - shape.scale) > 1e-9:
        raise HHBenchError(f"{name} scales by {scaling} now and by {shape.scale} when it was converted")
    if isinstance(slot, CrossAttentionSlot):
        out = slot(query, key, value, attention_mask)
        weights = slot.weights(query, key, attention_mask) if output_attentions else None
        return out.transpose(1, 2).contiguous(), weights
    # The mask counts the tokens where a cache gives back the keys of a window only.
    num_tokens = max(key.shape[2], 0 if attention_mask is None else attention_mask.shape[1])
    if sliding_window is not None and sliding_window < num_tokens:
        if sliding_window != slot.placement.window or not slot.placement.keeps_window:
            raise UsageError(
                f"{name} has a sliding window of {sliding_window} tokens, and {num_tokens} are in use, more than it "
                "was converted for"
            )
        attention_mask = None if attention_mask is None else attention_mask[:, -key.shape[2] :]
    if output_attentions and slot.continues(key):
        raise UsageError(f"{name} decodes from a state, which has no weights: output_attentions needs use_cache=False")
    out = slot(query, key, value, attention_mask)
    weights = slot.attention.weights(query, key, key_mask=attention_mask) if output_attentions else None
    return out.transpose(1, 2).contiguous(), weights


def refuse_unknown(module: nn.Module, mask: Tensor | None, other: Mapping[str, Any]) -> None:
    """A keyword that changes what attention means must not be dropped in silence."""
    name = type(module).__name__
    given = sorted(keyword for keyword, value in other.items() if value is not None and keyword not in HARMLESS)
    if given:
        what = ", ".join(f"{keyword} ({MEANINGS[keyword]})" if keyword in MEANINGS else keyword for keyword in given)
        raise UsageError(f"{name} passes {what}, which no attention of hhbench takes")
    if mask is not None and mask.ndim != 2:
        raise UsageError(f"{name} got a {mask.ndim}-D mask {list(mask.shape)}; hhbench takes padding masks [B, N]")


def _padding_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    mask_function: MaskFunction | None = None,
    batch_size: int = 1,
    kv_length: int = 0,
    kv_offset: int = 0,
    q_length: int = 0,
    q_offset: int | Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """What transformers calls in place of building a 4-D mask: hands the [B, past + N] padding mask through.

    None when nothing is padded, so that the fast paths without a mask are taken; but never None where a window is
    shorter than the tokens: the mask then tells a layer how many there are (see `_attend`).
    """
    del args, kwargs
    if mask_function is bidirectional_mask_function:  # an encoder's, or cross-attention to one: no cache grows here
        return _unless_all_attend(attention_mask)
    num_tokens = kv_length if q_offset is None else int(q_offset) + q_length
    if kv_offset + kv_length > num_tokens:
        raise UsageError(
            f"the model has {num_tokens} tokens and a cache or a mask for {kv_offset + kv_length}: hhbench's "
            "attentions take a cache that grows with the tokens, the library's default"
        )
    if mask_function in (causal_mask_function, None):
        return _unless_all_attend(attention_mask)
    assert mask_function is not None
    queries = torch.arange(num_tokens - q_length, num_tokens, device=device)
    if not patterns(mask_function, queries, local_size, batch_size=batch_size, num_tokens=num_tokens):
        raise UsageError(
            "the model asks for packed sequences (position ids that start anew), chunks or another mask of its own, "
            "which hhbench's attentions can't honour"
        )
    if local_size is None or local_size >= num_tokens:
        return _unless_all_attend(attention_mask)
    if attention_mask is None:
        return torch.ones(batch_size, num_tokens, dtype=torch.bool, device=device)
    mask = attention_mask.bool()
    if bool(((mask[:, 1:] & ~mask[:, :-1]).sum(-1) + mask[:, 0] > 1).any()):
        raise UsageError(
            f"the mask leaves out tokens between attended ones, which the model's window of {local_size} tokens would "
            "count and hhbench's doesn't: pad on one side"
        )
    return mask


def _unless_all_attend(mask: Tensor | None) -> Tensor | None:
    return None if mask is None or bool(mask.all()) else mask.bool()


def patterns(
    mask_function: MaskFunction,
    queries: Tensor,
    local_size: int | None,
    *,
    batch_size: int = 1,
    num_tokens: int | None = None,
) -> list[tuple[bool, int | None]]:
    """What a mask function may be, as (causal, window): all whose answers for these queries it gives.

    A query i of a causal window w sees keys i - w < j <= i, of a bidirectional one |i - j| < w, as in
    `softmax-window`. The library's bidirectional windows include their size, so that w may be one more. Asked are each
    query's neighbours, which a boundary between packed sequences or chunks parts, and the keys at a window's edge.

    Args:
        queries: their indices [N].
        local_size: the window that the library says it is; None for one that says nothing.
        num_tokens: keys lie below it; None = anywhere.
    """
    windows = [None] if local_size is None else [local_size, local_size + 1]
    edges = {1, 2} if local_size is None else {1, local_size - 1, local_size, local_size + 1}
    away = torch.tensor(sorted({0, *edges, *(-edge for edge in edges)}), device=queries.device)
    keys = queries[:, None] - away
    exists = (keys >= 0) & (keys < (num_tokens or keys.max() + 1))
    rows = torch.arange(batch_size, device=queries.device)[:, None, None]
    asked = (rows, torch.zeros_like(rows), queries[None, :, None], torch.where(exists, keys, queries[:, None])[None])
    try:
        seen = mask_function(*asked)
    except Exception:  # a model's own function may ask anything of its arguments
        return []
    found = []
    for causal in (True, False):
        for window in windows:
            expected = (away >= 0) | torch.tensor(not causal, device=away.device)
            if window is not None:
                expected = expected & (away.abs() < window)
            if bool(((seen == expected) | ~exists).all()):
                found.append((causal, window))
    return found


AttentionInterface.register(INTERFACE, _attend)
AttentionMaskInterface.register(INTERFACE, _padding_mask)
