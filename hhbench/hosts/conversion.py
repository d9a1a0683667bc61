"""Give every attention layer of a model another attention."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import Attention as TimmAttention
from torch import nn
from transformers import PreTrainedModel

from hhbench.attention import ATTENTIONS, Attention, AttentionSpec, SequenceMixer
from hhbench.errors import UsageError
from hhbench.hosts.interface import INTERFACE, transformers_layers
from hhbench.hosts.slots import SLOT, AttentionSlot, HostLayer, MixerSlot, Placement, slots
from hhbench.hosts.timm_layers import SlottedTimmAttention, timm_layers


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
    built: list[tuple[Placement, Attention | SequenceMixer]] = []
    for index, layer in enumerate(layers):  # all of them before any is attached: a refused model stays as it was
        chosen, chosen_options = (softmax, {}) if index in kept else (spec, options)
        module = chosen.build(layer.shape, **chosen_options)
        module.to(_device_of(layer)).train(layer.module.training)
        built.append((Placement(layer.name, chosen.name, chosen_options, layer.shape), module))
    for placement, module in built:
        attach(model, placement, module)
    if isinstance(model, PreTrainedModel):
        model.set_attn_implementation(INTERFACE)
        if any(isinstance(module, SequenceMixer) for _, module in built):
            _without_cache(model)
    return model


def attach(model: nn.Module, placement: Placement, built: Attention | SequenceMixer) -> None:
    """Put an attention into its layer, or a mixer into the layer's place."""
    layer = model.get_submodule(placement.layer)
    if isinstance(built, SequenceMixer):
        parent, _, name = placement.layer.rpartition(".")
        setattr(model.get_submodule(parent), name, MixerSlot(built, placement, layer).train(built.training))
        return
    layer.add_module(SLOT, AttentionSlot(built, placement).train(built.training))
    if isinstance(layer, TimmAttention):
        layer.__class__ = SlottedTimmAttention


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
        return transformers_layers(model)
    found = timm_layers(model)
    if not found:
        raise UsageError(
            f"{type(model).__name__} can't be a host: it is no transformers model and has no timm Attention layer"
        )
    return found


def _device_of(layer: HostLayer) -> torch.device:
    """Where a layer's weights lie. Quantised ones are refused: they can't be finetuned."""
    weights = list(layer.module.parameters())
    for weight in weights:
        if not weight.is_floating_point() or weight.element_size() < 2:
            raise UsageError(f"{layer.name} has quantised weights ({weight.dtype}): load the model unquantised")
    if not weights:
        raise UsageError(f"{layer.name} shows no weights; if they are quantised, load the model unquantised")
    return weights[0].device


def _without_cache(model: PreTrainedModel) -> None:
    """Have a model whose mixers keep no keys and values see every token at each step of generation."""
    model.config.get_text_config().use_cache = False
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.use_cache = False
