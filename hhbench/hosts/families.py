"""Hosted models as model classes of transformers: what lets its own Auto classes load a converted folder.

A converted `LlamaForCausalLM` is an `HHBenchLlamaForCausalLM`, whose `HHBenchLlamaConfig` has the model type
`hhbench-llama` and says in its entry `hhbench` what every layer was given. Importing this module registers the families
below with every Auto class that knows them. Without it the model type is unknown and loading fails: a converted folder
never comes back as softmax in silence.

Any other family is registered when a model of it is converted, or by `hhbench.load`, which a fresh process needs then.
"""

import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from hhbench.attention import ATTENTIONS, Attention, AttentionSpec, MixerShape, SequenceMixer
from hhbench.errors import HHBenchError, UsageError
from hhbench.hosts.cache import ConstantState
from hhbench.hosts.interface import INTERFACE
from hhbench.hosts.slots import SLOT, MixerSlot, Placement, attach, content_of, hosted
from hhbench.linear_attention import LinearAttention
from hhbench.registry import is_code_reference, source_hash

FAMILIES = (
    "Bert", "Roberta", "DistilBert", "GPT2", "Llama", "Qwen2", "Qwen3", "Mistral", "Dinov2", "ViT", "DeiT",
)  # fmt: skip
ALIGNMENT = 64  # bytes: torch's allocator on the CPU

_OWN: ContextVar[Mapping[str, AttentionSpec]] = ContextVar("own attentions", default=MappingProxyType({}))


class Hosted(PreTrainedModel):  # type: ignore[misc]  # transformers is untyped
    """What a hosted model class adds to the library's, which comes after it in the order of bases."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        if getattr(config, "hhbench", None) is None:
            raise UsageError(f"{type(self).__name__} has nothing to put into its layers: make it by hhbench.convert")
        config._attn_implementation = INTERFACE
        super().__init__(config, *args, **kwargs)
        for entry, name in _layers(self):
            layer = self.get_submodule(name)
            built = entry.build()
            device = next((p.device for p in layer.parameters()), torch.device("meta"))
            if built is not None and device.type != "meta":  # while weights are being loaded, all else is there
                built.to(device)
            attach(self, dataclasses.replace(entry.placement, layer=name), built)
        _host_submodels(self)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """The library's; but weights that an attention lacks are an error, not drawn anew.

        Raises:
            HHBenchError: an attention lacks weights.
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = sorted(key for key in info["missing_keys"] if key.startswith(_prefixes_of_ours(model)))
        if missing:
            raise HHBenchError(
                f"{model.name_or_path} lacks {len(missing)} weights of its attentions, {missing[0]} the first"
            )
        # Buffers that aren't saved were made anew by the library, which knows the values of its own alone.
        slots = hosted(model)
        for entry, name in _layers(model):
            content = content_of(slots[name])
            lost = [] if content is None else dict(content.named_buffers()).keys() - content.state_dict().keys()
            if content is not None and lost and (fresh := entry.build()) is not None:
                for key in lost:
                    content.get_buffer(key).copy_(fresh.get_buffer(key))
        # What is mapped from a file begins anywhere, and some products of a vector depend on that in the last bit.
        for tensor in itertools.chain(model.parameters(), model.buffers()):
            if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
                tensor.data = tensor.data.clone()
        return (model, info) if output_loading_info else model

    def save_pretrained(self, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any) -> None:
        """The library's, with the weights' own names: the older ones of some families would fit our attentions' too."""
        self.config.hhbench = description(self)
        state = dict(self.state_dict() if state_dict is None else state_dict)
        ours = _prefixes_of_ours(self)
        for key in state:
            if key.startswith(ours):  # queries and keys may have one map: the library ties what it knows alone
                state[key] = state[key].clone()
        super().save_pretrained(*args, state_dict=state, **{"save_original_format": False} | kwargs)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Refuse any other: it would pass by what was converted."""
        if attn_implementation != INTERFACE:
            raise UsageError(f"{type(self).__name__} was converted; {attn_implementation!r} would bring softmax back")
        super().set_attn_implementation(attn_implementation, *args, **kwargs)


def become_hosted(model: PreTrainedModel) -> None:
    """Give a converted model its hosted class and its config the hosted one, in place."""
    _swap_class(model)
    _host_submodels(model)
    cls: Any = type(model.config)
    if not hasattr(cls, "hhbench"):
        model.config.__class__ = hosted_config(cls)
    model.config.hhbench = description(model)


def hosted_class(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`HHBench<Name>` of a model class, whose family it registers with every Auto class that knows the library's.

    A family that isn't one of `FAMILIES` is registered from here on, and not yet in a fresh process: there its folders
    take `hhbench.load`.
    """
    untyped: Any = cls
    _register(untyped.config_class)
    hosted: type[PreTrainedModel] = _hosted_class(untyped)
    return hosted


@functools.cache
def _hosted_class(cls: Any) -> Any:
    bases = (ConstantState, Hosted, cls) if cls.can_generate() else (Hosted, cls)
    return _make(cls, bases, config_class=hosted_config(cls.config_class))


@functools.cache
def hosted_config(cls: Any) -> Any:
    """`HHBench<Name>` of a config class: the same with the entry `hhbench`, under a model type of its own."""
    annotations = {"hhbench": dict | None}
    return _make(cls, (cls,), model_type=f"hhbench-{cls.model_type}", hhbench=None, __annotations__=annotations)


def _make(cls: type, bases: tuple[type, ...], **attributes: Any) -> Any:
    name = f"HHBench{cls.__name__}"
    globals()[name] = made = type(name, bases, {"__module__": __name__, "__doc__": cls.__doc__} | attributes)
    return made  # a name of this module: pickle finds it here


@functools.cache
def _register(config_class: Any) -> None:
    """Register a family: its config, and each of its model classes where the library's is."""
    hosted = hosted_config(config_class)
    transformers.AutoConfig.register(hosted.model_type, hosted, exist_ok=True)
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        if mapping is None or config_class not in mapping:
            continue
        found = mapping[config_class]
        classes = [cls for cls in (found if isinstance(found, tuple) else (found,)) if cls.config_class is config_class]
        if classes:  # a mapping may name a composite model by the config of its text model
            ours = tuple(map(_hosted_class, classes)) if isinstance(found, tuple) else _hosted_class(found)
            mapping.register(hosted, ours, exist_ok=True)


def _swap_class(model: PreTrainedModel) -> None:
    if isinstance(model, Hosted):
        return
    cls: Any = type(model)
    model.__class__ = hosted_class(cls)
    # transformers learns what a class can record when a model of it is made.
    PreTrainedModel.__init__(object.__new__(type(model)), model.config)


def _host_submodels(model: PreTrainedModel) -> None:
    """The models inside a model too: each can be saved, and the library's renaming of old weights passes them by."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            _swap_class(module)


# --- what a config says ---


@contextlib.contextmanager
def own_attentions(specs: Mapping[str, AttentionSpec]) -> Iterator[None]:
    """While a model is loaded: what stands for the users' own attentions that its config names."""
    token = _OWN.set(specs)
    try:
        yield
    finally:
        _OWN.reset(token)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What a layer was given, as config.json says it.

    Attributes:
        placement: its layer is named from the base model on, so that every head class can load the folder.
        in_head: the layer is none of the base model's; its name is that in the whole model.
        own: for a user's own attention, the class ("file.py:Class") and the sha256 of its source.
        dtypes: of those tensors whose dtype isn't the model's.
    """

    placement: Placement
    in_head: bool = False
    own: Mapping[str, str | None] | None = None
    dtypes: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def parse(cls, said: Mapping[str, Any]) -> "Entry":
        extras = {f.name: said[f.name] for f in dataclasses.fields(cls) if f.name in said}
        placement = {key: value for key, value in said.items() if key not in extras}
        return cls(Placement(**placement | {"shape": MixerShape(**placement["shape"])}), **extras)

    def plain(self) -> dict[str, Any]:
        said = dataclasses.asdict(self)
        placement: dict[str, Any] = said.pop("placement")
        return placement | {key: value for key, value in said.items() if value}

    def spec(self) -> AttentionSpec:
        """The attention's spec. Code that a folder names is not imported.

        Raises:
            UsageError: it is a user's own and wasn't given, or there is none of this name.
        """
        name, given = self.placement.attention, _OWN.get()
        if name in given:
            return given[name]
        if name not in ATTENTIONS.names() and (self.own is not None or is_code_reference(name)):
            raise UsageError(
                f"the model was converted with a user's own attention, {name}, which a folder may not import: "
                'load it by hhbench.load(folder, attn="file.py:Class")'
            )
        return ATTENTIONS.get(name, allow_code=False)

    def build(self) -> Attention | SequenceMixer | None:
        """The attention with fresh weights of the saved dtypes, on the CPU: loading takes place on the meta device.

        None for cross-attention, which is the library's.
        """
        if self.placement.cross:
            return None
        dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            with torch.device("cpu"), torch.random.fork_rng(devices=[]):
                built = self.spec().build(self.placement.shape, **self.placement.options)
        finally:
            torch.set_default_dtype(dtype)
        for name, tensor in built.to(dtype).state_dict(keep_vars=True).items():
            if name in self.dtypes:
                tensor.data = tensor.data.to(getattr(torch, self.dtypes[name]))
        return built


def description(model: nn.Module) -> dict[str, Any]:
    """What each layer of a converted model was given, as plain JSON: the entry `hhbench` of its config."""
    prefix = _prefix(model)
    common = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    layers = []
    for name, slot in hosted(model).items():
        in_head, content = not name.startswith(prefix), content_of(slot)
        placement = dataclasses.replace(slot.placement, layer=name if in_head else name.removeprefix(prefix))
        dtypes = {
            key: str(tensor.dtype).removeprefix("torch.")
            for key, tensor in (content.state_dict() if content is not None else {}).items()
            if tensor.is_floating_point() and tensor.dtype != common
        }
        layers.append(Entry(placement, in_head, _own(content), dtypes).plain())
    return {"layers": layers}


def _layers(model: PreTrainedModel) -> list[tuple[Entry, str]]:
    """What a hosted model's config says of its layers, each with its name in this model."""
    path = model.config.name_or_path or type(model).__name__
    try:
        entries = [Entry.parse(said) for said in model.config.hhbench["layers"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise HHBenchError(f"the config of {path} doesn't say what its layers were given: {error!r}") from error
    prefix = _prefix(model)
    return [
        (entry, entry.placement.layer if entry.in_head else prefix + entry.placement.layer)
        for entry in entries
        if prefix or not entry.in_head  # a base model has no head
    ]


def _prefix(model: nn.Module) -> str:
    """Where the base model lies in a model: "model." in a LlamaForCausalLM, "" where it is one itself."""
    whole = not isinstance(model, PreTrainedModel) or model.base_model is model
    return "" if whole else f"{model.base_model_prefix}."


def _prefixes_of_ours(model: nn.Module) -> tuple[str, ...]:
    """How the names of the weights begin that aren't the library's."""
    return tuple(f"{n}." if isinstance(slot, MixerSlot) else f"{n}.{SLOT}." for n, slot in hosted(model).items())


def _own(content: Attention | SequenceMixer | None) -> dict[str, str | None] | None:
    """Where a user's own attention comes from; None for hhbench's."""
    part = type(content.query_map) if type(content) is LinearAttention else type(content)
    if content is None or part.__module__.startswith("hhbench."):
        return None
    path = getattr(sys.modules.get(part.__module__), "__file__", None)
    return {"class": f"{Path(path).name if path else part.__module__}:{part.__qualname__}", "sha256": source_hash(part)}


for _name in FAMILIES:
    _register(getattr(transformers, f"{_name}Config"))
