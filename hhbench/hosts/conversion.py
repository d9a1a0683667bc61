"""Give every attention layer of a model another attention: first the plan, then its execution.

What becomes of a layer: it takes the attention asked for, unless

- it is to stay softmax (`keep_layers`), or to take another one (`layers`);
- it sees a sliding window of tokens that is shorter than the context: it stays softmax in that window;
- it is cross-attention: it stays the library's.

A model with a layer that does anything else is refused, and is left as it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hhbench.attention import ATTENTIONS, Attention, AttentionSpec, SequenceMixer
from hhbench.errors import UsageError
from hhbench.hosts.families import become_hosted
from hhbench.hosts.interface import INTERFACE
from hhbench.hosts.probe import UNBOUNDED, ranges, transformers_layers
from hhbench.hosts.slots import (
    WINDOWED,
    AttentionSlot,
    CrossAttentionSlot,
    HostLayer,
    MixerSlot,
    Placement,
    attach,
)
from hhbench.hosts.timm_layers import timm_layers

Choice = tuple[str | AttentionSpec, Mapping[str, Any]]


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes:
        layer: it.
        spec: what it gets; softmax for cross-attention, which gets nothing.
        options: of that.
        kept: why it stays as it is; empty where it is replaced.
        params: how many parameters that adds.
    """

    layer: HostLayer
    spec: AttentionSpec
    options: Mapping[str, Any]
    kept: str
    params: int

    @property
    def placement(self) -> Placement:
        layer = self.layer
        return Placement(layer.name, self.spec.name, self.options, layer.shape, layer.window, layer.cross)

    def build(self) -> Attention | SequenceMixer:
        return self.spec.build(self.layer.shape, **self.options)


@dataclass(frozen=True)
class ConversionPlan:
    """What a conversion will do. Making one changes nothing.

    Attributes:
        model: the model.
        layers: in order of depth, without cross-attentions: their places here are their indices.
        cross: cross-attentions.
    """

    model: nn.Module
    layers: tuple[LayerPlan, ...]
    cross: tuple[LayerPlan, ...]

    @property
    def params(self) -> int:
        """How many parameters it adds."""
        return sum(layer.params for layer in self.layers)

    def lines(self) -> list[str]:
        """What will be replaced and what is kept, for a person."""
        said = []
        for (label, what), indices in self._alike(lambda one: (one.spec.label(one.options), _described(one))):
            params = sum(self.layers[i].params for i in indices)
            adds = f"adds {params:,} parameters" if params else "adds no parameters"
            get = "gets" if len(indices) == 1 else "get"
            said.append(f"{_layers(indices)} of {len(self.layers)} {get} {label}: {what}; {adds}")
        for (reason,), indices in self._alike(lambda one: (one.kept,), kept=True):
            said.append(f"{_layers(indices)}: {reason}: kept as softmax")
        if self.cross:
            said.append(f"cross-attention in {len(self.cross)} layers: kept as the library's softmax")
        return said

    def carry_out(self) -> nn.Module:
        """Convert the model in place, and return it."""
        built = []
        for one in self.layers:  # all of them before any is attached: a model that fails here stays as it was
            built.append((one.placement, one.build().to(_device_of(one.layer)).train(one.layer.module.training)))
        for placement, module in built:
            attach(self.model, placement, module)
        for one in self.cross:
            attach(self.model, one.placement)
        if isinstance(self.model, PreTrainedModel):
            self.model.set_attn_implementation(INTERFACE)
            if any(isinstance(module, SequenceMixer) for _, module in built):
                _without_cache(self.model)
            become_hosted(self.model)
        return self.model

    def _alike(self, key: Any, *, kept: bool = False) -> list[tuple[Any, list[int]]]:
        """Indices of layers that are kept, or replaced, by what they have in common; in order of the first."""
        found: dict[Any, list[int]] = {}
        for index, one in enumerate(self.layers):
            if bool(one.kept) == kept:
                found.setdefault(key(one), []).append(index)
        return list(found.items())


def plan_conversion(
    model: nn.Module,
    attn: str | AttentionSpec,
    *,
    keep_layers: Sequence[int] = (),
    layers: Mapping[int, Choice] | None = None,
    context: int | None = None,
    **options: Any,
) -> ConversionPlan:
    """What `convert` will do with the same arguments.

    Raises:
        UsageError: the model can't host it; the message names the model and the reason.
    """
    name, found = type(model).__name__, _all_layers(model)
    hosts = [layer for layer in found if not layer.cross]
    spec, softmax = _spec(attn), ATTENTIONS.get("softmax")
    chosen: dict[int, tuple[AttentionSpec, Mapping[str, Any], str]] = {}
    for index in keep_layers:
        chosen[_index(index, hosts, "keep")] = (softmax, {}, "--keep-layers")
    for index, (other, own_options) in (layers or {}).items():
        place = _index(index, hosts, "give another attention")
        if place in chosen:
            raise UsageError(f"layer {place} is given an attention twice, or one and is to be kept")
        chosen[place] = (_spec(other), own_options, "")
    sizes: dict[Any, int] = {}
    plans = []
    for index, layer in enumerate(hosts):
        _device_of(layer)
        part, part_options, kept = chosen.get(index, (spec, options, ""))
        limit = layer.shape.max_len if context is None else context
        if layer.window is not None and layer.window < limit:
            in_use = "all that the model can take" if limit == UNBOUNDED else f"the {limit:,} in use"
            kept = f"a sliding window of {layer.window:,} tokens, shorter than {in_use}"
            if index in chosen and part is not softmax:
                raise UsageError(f"{name}'s layer {index} can't take {part.name}: it has {kept}")
            part, part_options = ATTENTIONS.get(WINDOWED), {"window": layer.window}
        alike = (part, repr(sorted(part_options.items())), layer.shape)
        if alike not in sizes:
            sizes[alike] = _count_parameters(part, layer, part_options)
        plans.append(LayerPlan(layer, part, part_options, kept, sizes[alike]))
    unasked = [one for index, one in enumerate(plans) if index not in chosen]
    if spec is not softmax and unasked and all(one.kept for one in plans):
        raise UsageError(
            f"{name} has nothing to convert: each layer has {unasked[0].kept}; say how many tokens will be in use "
            "(context)"
        )
    cross = [LayerPlan(layer, softmax, {}, "cross-attention", 0) for layer in found if layer.cross]
    return ConversionPlan(model, tuple(plans), tuple(cross))


def convert(
    model: nn.Module,
    attn: str | AttentionSpec,
    *,
    keep_layers: Sequence[int] = (),
    layers: Mapping[int, Choice] | None = None,
    context: int | None = None,
    **options: Any,
) -> nn.Module:
    """Give every attention layer of a model another attention, in place, and return the model.

    Args:
        model: a `transformers` model or a `timm` vision transformer.
        attn: an attention's name, `file.py:Class`, a dotted path, or a spec.
        keep_layers: these stay softmax, counted from 0 and, below 0, from the last. In an encoder-decoder the
            encoder's come first.
        layers: what some layers get instead, with its options.
        context: how many tokens will be in use at most; None = as many as the model can take. A layer with a sliding
            window shorter than that stays softmax in its window.
        options: of the attention.

    Raises:
        UsageError: the model can't host it; the message names the model and the reason.
    """
    plan = plan_conversion(model, attn, keep_layers=keep_layers, layers=layers, context=context, **options)
    return plan.carry_out()


def host_layers(model: nn.Module) -> list[HostLayer]:
    """The attention layers that hhbench can replace, in order of depth. Cross-attentions are not among them.

    Raises:
        UsageError: there are none, or one of them does what no attention here can do.
    """
    return [layer for layer in _all_layers(model) if not layer.cross]


def _all_layers(model: nn.Module) -> list[HostLayer]:
    if any(isinstance(module, MixerSlot) for module in model.modules()):
        raise UsageError(f"{type(model).__name__} has lost its attention to a mixer: start from the model before it")
    hosted = [m.placement for m in model.modules() if isinstance(m, AttentionSlot | CrossAttentionSlot)]
    if hosted:
        modules = dict(model.named_modules())
        return [HostLayer(p.layer, modules[p.layer], p.shape, p.window, p.cross) for p in hosted]
    if isinstance(model, PreTrainedModel):
        return transformers_layers(model)
    found = timm_layers(model)
    if not found:
        raise UsageError(
            f"{type(model).__name__} can't be a host: it is no transformers model and has no timm Attention layer"
        )
    return found


def _spec(attn: str | AttentionSpec) -> AttentionSpec:
    return ATTENTIONS.get(attn) if isinstance(attn, str) else attn


def _index(index: int, hosts: list[HostLayer], what: str) -> int:
    if not -len(hosts) <= index < len(hosts):
        raise UsageError(f"no layer {index} to {what}: the model has {len(hosts)}, counted from 0")
    return index % len(hosts)


def _count_parameters(spec: AttentionSpec, layer: HostLayer, options: Mapping[str, Any]) -> int:
    """Of one layer; found by building it, which also tells whether it can be built."""
    with torch.random.fork_rng(devices=[]):
        return sum(parameter.numel() for parameter in spec.build(layer.shape, **options).parameters())


def _described(one: LayerPlan) -> str:
    shape = one.layer.shape
    if not one.spec.convertible:
        return f"a mixer in place of the whole block of width {shape.dim}, projections included, {shape.direction}"
    shared = "" if shape.num_kv_heads == shape.num_heads else f" on {shape.num_kv_heads} key-value heads"
    return f"{shape.num_heads} heads{shared} of width {shape.head_dim}, {shape.direction}"


def _layers(indices: list[int]) -> str:
    return f"layer{'s' if len(indices) > 1 else ''} {ranges(indices)}"


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
