"""The places in a host that hold its attentions."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from timm.layers import Attention as TimmAttention
from torch import Tensor, nn
from transformers import Cache

from hhbench.attention import Attention, MixerShape, SequenceMixer
from hhbench.errors import UsageError

SLOT = "hhbench_slot"


@dataclass(frozen=True)
class Placement:
    """What a layer was given: enough to give it to it again.

    Attributes:
        layer: the layer's name in the model.
        attention: the attention's name, or a user's own as it was given.
        options: of the attention.
        shape: where it sits.
    """

    layer: str
    attention: str
    options: Mapping[str, Any]
    shape: MixerShape


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

    def __init__(self, mixer: SequenceMixer, placement: Placement, replaced: nn.Module) -> None:
        super().__init__()
        self.mixer, self.placement = mixer, placement
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
    suffix = f".{SLOT}"
    return {n.removesuffix(suffix): m for n, m in model.named_modules() if isinstance(m, AttentionSlot)}


def placements(model: nn.Module) -> list[Placement]:
    """What each layer of a host was given, in order of depth."""
    return [m.placement for m in model.modules() if isinstance(m, AttentionSlot | MixerSlot)]


def attentions(model: nn.Module) -> list[Attention | SequenceMixer]:
    """What was put into the host's layers, in order of depth."""
    hosted = (m for m in model.modules() if isinstance(m, AttentionSlot | MixerSlot))
    return [slot.attention if isinstance(slot, AttentionSlot) else slot.mixer for slot in hosted]


def attention_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the attentions added to the host."""
    return [p for attention in attentions(model) for p in attention.parameters()]
