"""The places in a host that hold its attentions."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from timm.layers import Attention as TimmAttention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache

from hhbench.attention import Attention, MixerShape, SequenceMixer, masked_softmax, repeat_heads
from hhbench.errors import UsageError

SLOT = "hhbench_slot"
WINDOWED = "softmax-window"  # what a layer keeps whose window is shorter than the context


@dataclass(frozen=True)
class Placement:
    """What a layer was given: enough to give it to it again.

    Attributes:
        layer: the layer's name in the model.
        attention: the attention's name, or a user's own as it was given.
        options: of the attention.
        shape: where it sits.
        window: of the layer; see `HostLayer`.
        cross: it is cross-attention, which stays the library's.
    """

    layer: str
    attention: str
    options: Mapping[str, Any]
    shape: MixerShape
    window: int | None = None
    cross: bool = False

    @property
    def keeps_window(self) -> bool:
        """It was given softmax in the layer's own window, and so sees what the library would."""
        return self.window is not None and self.attention == WINDOWED and self.options.get("window") == self.window

    @property
    def is_softmax(self) -> bool:
        """The layer computes what it did before the conversion: softmax, in its own window where it has one."""
        return self.attention == "softmax" or self.keeps_window


class Continuation(Protocol):
    """A cache's share of a layer: what the layer's attention goes on from."""

    def run(self, module: Attention | SequenceMixer, *inputs: Tensor, key_mask: Tensor | None) -> Tensor:
        """The module's output for new tokens after all earlier ones."""


Interceptor = Callable[["AttentionSlot", Tensor, Tensor, Tensor, Tensor | None], Tensor]


class AttentionSlot(nn.Module):
    """The place in a host's layer that holds its attention.

    Attributes:
        attention: what the layer runs.
        placement: how it came there.
        interceptor: while set, called instead with (slot, q, k, v, key_mask): attention transfer and the fidelity
            report watch a layer through it.
    """

    def __init__(self, attention: Attention, placement: Placement) -> None:
        super().__init__()
        self.attention, self.placement = attention, placement
        self.interceptor: Interceptor | None = None
        self._continued: tuple[Continuation, Tensor] | None = None

    def continue_from(self, layer: Continuation, keys: Tensor) -> None:
        """The call with these keys, which comes next, goes on from a cache's state."""
        self._continued = layer, keys

    def continues(self, keys: Tensor) -> bool:
        """Whether a call with these keys will go on from a state, so that they are not all that is attended to."""
        return self._continued is not None and self._continued[1] is keys  # others: of a call that failed on its way

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        continued, self._continued = self._continued if self.continues(k) else None, None
        if self.interceptor is not None:
            return self.interceptor(self, q, k, v, key_mask)
        if continued is not None:
            return continued[0].run(self.attention, q, k, v, key_mask=key_mask)
        out: Tensor = self.attention(q, k, v, key_mask=key_mask)
        return out


class MixerSlot(nn.Module):
    """Stands where a host's attention module was, and takes what the host passes it.

    Everything inside that module goes: projections, rotary embeddings, cache. Where a family keeps its output
    projection outside (BERT), that stays, after the mixer's own.
    """

    def __init__(self, mixer: SequenceMixer, placement: Placement, replaced: nn.Module) -> None:
        super().__init__()
        self.mixer, self.placement = mixer, placement
        self.layer_idx: int | None = getattr(replaced, "layer_idx", None)
        self._signature = inspect.signature(replaced.forward)
        self._returns_weights = not isinstance(replaced, TimmAttention)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = self._signature.bind(*args, **kwargs).arguments
        x: Tensor = next(iter(given.values()))
        passed = given | given.get("kwargs", {})
        mask = passed.get("attention_mask", passed.get("attn_mask"))
        cache = next((value for value in passed.values() if isinstance(value, Cache)), None)
        layer = next((layer for layer in getattr(cache, "layers", ()) if getattr(layer, "slot", None) is self), None)
        if cache is not None and layer is None:
            raise UsageError(f"{type(self.mixer).__name__} keeps no key-value cache: pass use_cache=False")
        if mask is not None and mask.ndim != 2:
            raise UsageError(f"a mixer takes padding masks [B, N], not a {mask.ndim}-D mask {list(mask.shape)}")
        out = self.mixer(x, key_mask=mask) if layer is None else layer.run(self.mixer, x, key_mask=mask)
        return (out, None) if self._returns_weights else out


class CrossAttentionSlot(nn.Module):
    """Marks a layer of cross-attention, which a conversion keeps as it was: softmax over an encoder's tokens."""

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.placement = placement

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """q [B, H, N, D], k and v [B, G, M, D], key_mask bool [B, M] -> [B, H, N, D]."""
        shape = self.placement.shape
        return scaled_dot_product_attention(
            q,
            repeat_heads(k, shape.num_heads),
            repeat_heads(v, shape.num_heads),
            attn_mask=None if key_mask is None else key_mask[:, None, None, :],
            dropout_p=shape.dropout if self.training else 0.0,
            scale=shape.scale,
        )

    def weights(self, q: Tensor, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """[B, H, N, M]."""
        shape = self.placement.shape
        scores = q @ repeat_heads(k, shape.num_heads).mT * shape.scale
        return masked_softmax(scores, None if key_mask is None else key_mask[:, None, None, :])


@dataclass(frozen=True)
class HostLayer:
    """An attention layer of a host.

    Attributes:
        name: of its module in the model.
        module: itself.
        shape: of its attention.
        window: w, where it sees only so many tokens: i - w < j <= i if causal, else |i - j| < w. None: all of them.
        cross: its keys are another sequence's: cross-attention, which is never replaced.
    """

    name: str
    module: nn.Module
    shape: MixerShape
    window: int | None = None
    cross: bool = False


class SlottedTimmAttention(TimmAttention):  # type: ignore[misc]  # timm is untyped
    """timm's Attention with a slot where its softmax was; qkv, norms, gate and proj are timm's."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise UsageError("hhbench hosts timm's attention without a mask and bidirectional")
        gate = self.gate(x).sigmoid() if getattr(self, "gate", None) is not None else None
        B, N = x.shape[:2]
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = getattr(self, SLOT)(q, k, v, None).transpose(1, 2).reshape(B, N, -1)
        if hasattr(self, "norm"):
            x = self.norm(x)
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))  # type: ignore[no-any-return]


def attach(model: nn.Module, placement: Placement, built: Attention | SequenceMixer | None = None) -> None:
    """Put an attention into its layer, or a mixer into the layer's place, or mark cross-attention as kept."""
    layer = model.get_submodule(placement.layer)
    if placement.cross:
        layer.add_module(SLOT, CrossAttentionSlot(placement).train(layer.training))
        return
    assert built is not None
    if isinstance(built, SequenceMixer):
        parent, _, name = placement.layer.rpartition(".")
        setattr(model.get_submodule(parent), name, MixerSlot(built, placement, layer).train(built.training))
        return
    layer.add_module(SLOT, AttentionSlot(built, placement).train(built.training))
    if isinstance(layer, TimmAttention):
        layer.__class__ = SlottedTimmAttention


Slot = AttentionSlot | MixerSlot | CrossAttentionSlot


def hosted(model: nn.Module) -> dict[str, Slot]:
    """Everything of hhbench's in a model, by the name of the layer where it is, in order of depth."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, Slot)}
    return {name.removesuffix(f".{SLOT}"): slot for name, slot in found.items()}


def slots(model: nn.Module) -> dict[str, AttentionSlot]:
    """The slots of a host by layer name, in order of depth."""
    return {name: slot for name, slot in hosted(model).items() if isinstance(slot, AttentionSlot)}


def placements(model: nn.Module) -> list[Placement]:
    """What each layer of a host was given, in order of depth; cross-attentions, which were left as they are, too."""
    return [slot.placement for slot in hosted(model).values()]


def content_of(slot: Slot) -> Attention | SequenceMixer | None:
    """What was put there; None for cross-attention, which is the library's."""
    if isinstance(slot, CrossAttentionSlot):
        return None
    return slot.attention if isinstance(slot, AttentionSlot) else slot.mixer


def attentions(model: nn.Module) -> list[Attention | SequenceMixer]:
    """What was put into the host's layers, in order of depth."""
    return [put for put in map(content_of, hosted(model).values()) if put is not None]


def attention_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the attentions added to the host."""
    return [p for attention in attentions(model) for p in attention.parameters()]
