"""Models of transformers and timm, and how to give them another attention.

hhbench writes no Transformer. A host keeps its projections, rotary embeddings, norms and heads; only what happens
between q, k, v and the output changes. Every hosted layer gets an `AttentionSlot` as a child module, which holds the
attention:

- transformers calls whatever function is registered under the name in `config._attn_implementation`. Ours finds the
  slot on the calling module. A layer belongs to us when it makes that call, and a dry run tells which do: no list of
  architectures is kept.
- timm's `Attention` becomes a subclass of itself, which keeps `qkv` and `proj` and so loads the same weights.

A sequence mixer (H3, Hyena) has projections of its own: a `MixerSlot` stands where the host's attention module was.

What can't be hosted is refused by name, with the reason, before anything trains.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention as TimmAttention
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Cache,
    PreTrainedModel,
)
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from hhbench.attention import ATTENTIONS, Attention, AttentionSpec, MixerShape, SequenceMixer
from hhbench.errors import HHBenchError, UsageError

INTERFACE = "hhbench"
_PROBE = "hhbench-probe"
_SLOT = "hhbench_slot"

Interceptor = Callable[["AttentionSlot", Tensor, Tensor, Tensor, Tensor | None], Tensor]


class AttentionSlot(nn.Module):
    """The place in a host's layer that holds its attention.

    Attributes:
        attention: what the layer runs.
        interceptor: while set, called instead with (slot, q, k, v, key_mask): attention transfer and the fidelity
            report watch a layer through it.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.attention = attention
        self.interceptor: Interceptor | None = None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        if self.interceptor is not None:
            return self.interceptor(self, q, k, v, key_mask)
        out: Tensor = self.attention(q, k, v, key_mask=key_mask)
        return out


class MixerSlot(nn.Module):
    """Stands where a host's attention module was, and takes what the host passes it.

    Everything inside that module goes: projections, rotary embeddings, cache. Where a family keeps its output
    projection outside (BERT), that stays, after the mixer's own.
    """

    def __init__(self, mixer: SequenceMixer, replaced: nn.Module) -> None:
        super().__init__()
        self.mixer = mixer
        self._signature = inspect.signature(replaced.forward)
        self._returns_weights = not isinstance(replaced, TimmAttention)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self._signature.bind(*args, **kwargs).arguments
        x: Tensor = next(iter(given.values()))
        passed = given | given.get("kwargs", {})
        mask = passed.get("attention_mask", passed.get("attn_mask"))
        if any(isinstance(value, Cache) for value in passed.values()):
            raise UsageError(f"{type(self.mixer).__name__} keeps no key-value cache: pass use_cache=False")
        if mask is not None and mask.ndim != 2:
            raise UsageError(f"a mixer takes padding masks [B, N], not a {mask.ndim}-D mask {list(mask.shape)}")
        out = self.mixer(x, key_mask=mask)
        return (out, None) if self._returns_weights else out


@dataclass(frozen=True)
class HostLayer:
    """An attention layer that a host lets us replace: its name in the model, its module, its shape."""

    name: str
    module: nn.Module
    shape: MixerShape


def slots(model: nn.Module) -> dict[str, AttentionSlot]:
    """The slots of a host by layer name, in order of depth."""
    suffix = f".{_SLOT}"
    return {n.removesuffix(suffix): m for n, m in model.named_modules() if isinstance(m, AttentionSlot)}


def attentions(model: nn.Module) -> list[Attention | SequenceMixer]:
    """What was put into the host's layers, in order of depth."""
    hosted = (m for m in model.modules() if isinstance(m, AttentionSlot | MixerSlot))
    return [slot.attention if isinstance(slot, AttentionSlot) else slot.mixer for slot in hosted]


def attention_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the attentions added to the host."""
    return [p for attention in attentions(model) for p in attention.parameters()]


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions [B, N] for a decoder: they count attended tokens, so left padding changes nothing."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def convert(
    model: nn.Module, attn: str | AttentionSpec, *, keep_layers: Sequence[int] = (), **options: Any
) -> nn.Module:
    """Give every attention layer of a model another attention, in place, and return the model.

    Args:
        model: a `transformers` model or a `timm` vision transformer.
        attn: an attention's name, `file.py:Class`, a dotted path, or a spec.
        keep_layers: these stay as they are, counted from 0 and, below 0, from the last.
        options: of the attention.

    Raises:
        UsageError: the model can't host it; the message names the model and the reason.
    """
    spec = ATTENTIONS.get(attn) if isinstance(attn, str) else attn
    layers = host_layers(model)
    for index in keep_layers:
        if not -len(layers) <= index < len(layers):
            raise UsageError(f"no layer {index} to keep: the model has {len(layers)}, counted from 0")
    kept = {index % len(layers) for index in keep_layers}
    softmax = ATTENTIONS.get("softmax")
    built: list[Attention | SequenceMixer] = []  # all of them before any is attached: a refused model stays as it was
    for index, layer in enumerate(layers):
        chosen, chosen_options = (softmax, {}) if index in kept else (spec, options)
        module = chosen.build(layer.shape, **chosen_options)
        built.append(module.to(_device_of(layer)).train(layer.module.training))
    for layer, module in zip(layers, built, strict=True):
        if isinstance(module, SequenceMixer):
            parent, _, name = layer.name.rpartition(".")
            setattr(model.get_submodule(parent), name, MixerSlot(module, layer.module).train(module.training))
        else:
            _attach(layer.module, module)
    if isinstance(model, PreTrainedModel):
        model.set_attn_implementation(INTERFACE)
        if any(isinstance(module, SequenceMixer) for module in built):
            _without_cache(model)
    return model


def host_layers(model: nn.Module) -> list[HostLayer]:
    """The attention layers that hhbench can replace, in order of depth.

    Raises:
        UsageError: there are none, or one of them does what no attention here can do.
    """
    if any(isinstance(module, MixerSlot) for module in model.modules()):
        raise UsageError(f"{type(model).__name__} has lost its attention to a mixer: start from the model before it")
    if hosted := slots(model):
        modules = dict(model.named_modules())
        return [HostLayer(name, modules[name], slot.attention.shape) for name, slot in hosted.items()]
    if isinstance(model, PreTrainedModel):
        return _transformers_layers(model)
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, TimmAttention)]
    if not found:
        raise UsageError(
            f"{type(model).__name__} can't be a host: it is no transformers model and has no timm Attention layer"
        )
    return [HostLayer(name, module, _timm_shape(model, name, module)) for name, module in found]


def _device_of(layer: HostLayer) -> torch.device:
    """Where a layer's weights lie. Quantised ones are refused: they can't be finetuned."""
    weights = list(layer.module.parameters())
    for weight in weights:
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise UsageError(f"{layer.name} has quantised weights ({weight.dtype}): load the model unquantised")
    if not weights:
        raise UsageError(f"{layer.name} shows no weights; if they are quantised, load the model unquantised")
    return weights[0].device


def _attach(module: nn.Module, attention: Attention) -> None:
    module.add_module(_SLOT, AttentionSlot(attention).train(attention.training))
    if isinstance(module, TimmAttention):
        module.__class__ = _SlottedTimmAttention


def _without_cache(model: PreTrainedModel) -> None:
    """Have a model whose mixers keep no keys and values see every token at each step of generation."""
    model.config.get_text_config().use_cache = False
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.use_cache = False


# ---- transformers ----------------------------------------------------------------------------------------------


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
    slot = getattr(module, _SLOT, None)
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


def _transformers_layers(model: PreTrainedModel) -> list[HostLayer]:
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


# ---- timm ------------------------------------------------------------------------------------------------------


class _SlottedTimmAttention(TimmAttention):  # type: ignore[misc]  # timm is untyped
    """timm's Attention with a slot where its softmax was; qkv, norms, gate and proj are timm's."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise UsageError("hhbench hosts timm's attention without a mask and bidirectional")
        gate = self.gate(x).sigmoid() if getattr(self, "gate", None) is not None else None
        B, N = x.shape[:2]
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = getattr(self, _SLOT)(q, k, v, None).transpose(1, 2).reshape(B, N, -1)
        if hasattr(self, "norm"):
            x = self.norm(x)
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))  # type: ignore[no-any-return]


def _timm_shape(model: nn.Module, name: str, module: Any) -> MixerShape:
    if type(module) is not TimmAttention:
        raise UsageError(
            f"{type(model).__name__} can't be a host: {name} is a {type(module).__name__}, which does more than softmax"
        )
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if patches is None:
        raise UsageError(f"{type(model).__name__} can't be a host: it doesn't say how many patches it sees")
    return MixerShape(
        dim=module.qkv.in_features,
        num_heads=module.num_heads,
        num_kv_heads=module.num_heads,
        head_dim=module.qkv.out_features // 3 // module.num_heads,
        scale=float(module.scale),
        max_len=patches + getattr(model, "num_prefix_tokens", 1),
        causal=False,
        dropout=float(module.attn_drop.p),
    )
