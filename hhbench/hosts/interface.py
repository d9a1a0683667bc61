"""transformers' attention and mask interfaces: what a model calls, and how to find the layers that call it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from hhbench.attention import MixerShape
from hhbench.errors import HHBenchError, UsageError
from hhbench.hosts.slots import SLOT, HostLayer

INTERFACE = "hhbench"
_PROBE = "hhbench-probe"


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
    output_hidden_states: bool | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool | None = None,
    **other: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls in place of its own attention: q [B, H, N, D] in, [B, N, H, E] out."""
    _refuse_unknown(module, attention_mask, key, sliding_window, other)
    slot = getattr(module, SLOT, None)
    if slot is None:
        raise HHBenchError(f"{type(module).__name__} has no hhbench attention: use hhbench.convert or hhbench.load")
    shape = slot.attention.shape
    if is_causal is not None and is_causal != shape.causal:
        raise HHBenchError(
            f"{type(module).__name__} asks for is_causal={is_causal}; it was converted as {shape.direction}"
        )
    if scaling is not None and abs(scaling - shape.scale) > 1e-9:
        raise HHBenchError(
            f"{type(module).__name__} scales by {scaling} now and by {shape.scale} when it was converted"
        )
    out = slot(query, key, value, attention_mask)
    weights = slot.attention.weights(query, key, key_mask=attention_mask) if output_attentions else None
    return out.transpose(1, 2).contiguous(), weights


def _refuse_unknown(
    module: nn.Module, mask: Tensor | None, key: Tensor, sliding_window: int | None, other: Mapping[str, Any]
) -> None:
    """A keyword that changes what attention means must not be dropped in silence."""
    name = type(module).__name__
    given = sorted(keyword for keyword, value in other.items() if value is not None)
    if given:
        raise UsageError(f"{name} passes {', '.join(given)}, which no attention of hhbench takes")
    if sliding_window is not None and sliding_window < key.shape[2]:
        raise UsageError(
            f"{name} has a sliding window of {sliding_window} tokens, shorter than the {key.shape[2]} in use"
        )
    if mask is not None and mask.ndim != 2:
        raise UsageError(f"{name} got a {mask.ndim}-D mask {list(mask.shape)}; hhbench takes padding masks [B, N]")


def _padding_mask(
    *args: Any,
    attention_mask: Tensor | None = None,
    mask_function: Callable[..., Any] | None = None,
    kv_length: int = 0,
    q_length: int = 0,
    q_offset: int | Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What transformers calls in place of building a 4-D mask: hands the [B, past + N] padding mask through.

    None when nothing is padded, so that the fast paths without a mask are taken.
    """
    del args, kwargs
    plain = mask_function in (causal_mask_function, bidirectional_mask_function, None)
    # A window's cache forgets what left the window: the tokens are counted, not its keys.
    tokens = kv_length if q_offset is None else max(kv_length, int(q_offset) + q_length)
    if not plain and not (local_size is not None and local_size >= tokens):
        what = f"a window of {local_size} tokens" if local_size is not None else "packed sequences or a mask of its own"
        raise UsageError(f"the model asks for {what}, which hhbench's attentions can't honour")
    if q_offset is not None and kv_length > int(q_offset) + q_length:
        raise UsageError(
            f"the model has {int(q_offset) + q_length} tokens and a cache or a mask for {kv_length}: hhbench's "
            "attentions take a cache that grows with the tokens, the library's default"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask.bool()


AttentionInterface.register(INTERFACE, _attend)
AttentionMaskInterface.register(INTERFACE, _padding_mask)


def transformers_layers(model: PreTrainedModel) -> list[HostLayer]:
    """Ask the model: run it once on a few tokens under a probe and see which modules call the interface, and how."""
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise UsageError(
            f"{name} can't be a host: it is an encoder-decoder, and cross-attention has no key mask of its own"
        )
    names = {module: module_name for module_name, module in model.named_modules()}
    layers: list[HostLayer] = []

    def probe(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        is_causal: bool | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        **other: Any,
    ) -> tuple[Tensor, None]:
        _refuse_unknown(module, attention_mask, key, None, other)
        D = query.shape[3]
        config = model.config.get_text_config()
        max_len = key.shape[2] if _is_vision(model) else int(getattr(config, "max_position_embeddings", 0) or 2**31)
        shape = MixerShape(
            dim=int(config.hidden_size),
            num_heads=query.shape[1],
            num_kv_heads=key.shape[1],
            head_dim=D,
            scale=D**-0.5 if scaling is None else float(scaling),
            max_len=max_len,
            causal=bool(getattr(module, "is_causal", False) if is_causal is None else is_causal),
            dropout=float(dropout),
        )
        layers.append(HostLayer(names[module], module, shape))
        return value.new_zeros(*query.shape[:3], value.shape[3]).transpose(1, 2).contiguous(), None

    AttentionInterface.register(_PROBE, probe)
    AttentionMaskInterface.register(_PROBE, _padding_mask)
    before = model.config._attn_implementation
    modes = {module: module.training for module in model.modules()}
    try:
        model.set_attn_implementation(_PROBE)
        # Training mode shows the dropout that the model passes; the generator is left as it was.
        device = next(model.parameters()).device
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model.train()(**_few_tokens(model))
    except UsageError as error:
        raise UsageError(f"{name} can't be a host: {error}") from error
    except Exception as error:
        raise UsageError(
            f"{name} can't be a host: it doesn't run under transformers' attention interface "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})"
        ) from error
    finally:
        model.set_attn_implementation(before)
        for module, training in modes.items():
            module.training = training
    if not layers:
        raise UsageError(f"{name} can't be a host: it computes its attention itself, past transformers' interface")
    if len({layer.name for layer in layers}) < len(layers):
        raise UsageError(f"{name} can't be a host: it runs one attention layer several times")
    return layers


def _is_vision(model: PreTrainedModel) -> bool:
    return bool(model.main_input_name == "pixel_values")


def _few_tokens(model: PreTrainedModel) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    if not _is_vision(model):
        return {"input_ids": torch.zeros(1, 4, dtype=torch.long, device=device)}
    size = model.config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    dtype = next(model.parameters()).dtype
    return {"pixel_values": torch.zeros(1, model.config.num_channels, height, width, device=device, dtype=dtype)}
