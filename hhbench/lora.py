"""Low-rank finetuning (Hu et al. 2022): adapters beside a host's projections while it trains, merged when it is done.

peft's layers do the work and are put in place, so that the model keeps its class, and everything that knows a host
still knows it. After `merge` nothing is left of them but changed weights.
"""

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hhbench.errors import HHBenchError, UsageError, in_one_line
from hhbench.hosts import attention_parameters, slots

log = logging.getLogger("hhbench")

TARGETS = "qkvom"
FORM = "r=8,alpha=16,targets=qkvo (m: the MLPs too) and dropout=0.1"

# What the libraries call the projections of an attention layer. BERT's output projection lies beside the layer.
NAMES = {
    "q": ("q_proj", "query", "q_lin"),
    "k": ("k_proj", "key", "k_lin"),
    "v": ("v_proj", "value", "v_lin"),
    "o": ("o_proj", "out_proj", "out_lin", "c_proj", "proj", "dense"),
}
FUSED = ("c_attn", "qkv", "qkv_proj", "query_key_value")  # q, k and v in one


@dataclass(frozen=True)
class LoraSettings:
    """What is adapted, and how. Its text is what `parse` reads.

    Attributes:
        r: the rank of every adapter.
        alpha: an adapter's output is multiplied by alpha / r.
        targets: q, k, v, o: these projections of every hosted attention layer; m: the linear layers of its MLP.
        dropout: of an adapter's input.

    Raises:
        UsageError: a value that can't be.
    """

    r: int
    alpha: float
    targets: str
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.r < 1 or not 0 < self.alpha < float("inf") or not 0 <= self.dropout < 1:
            raise UsageError(f"LoRA needs r of 1 or more, alpha above 0, dropout from 0 to below 1, not {self}")
        if not self.targets or set(self.targets) - set(TARGETS):
            raise UsageError(f"LoRA's targets are letters of {TARGETS}, not {self.targets!r}")
        object.__setattr__(self, "targets", "".join(letter for letter in TARGETS if letter in self.targets))

    @classmethod
    def parse(cls, text: str) -> Self:
        """`r=8,alpha=16,targets=qkvo,dropout=0.1`: any of them, in any order.

        Without them r is 8, alpha 2 r, and the targets are qkvo.

        Raises:
            UsageError: the text is not of this form.
        """
        kinds = {"r": int, "alpha": float, "targets": str, "dropout": float}
        given: dict[str, Any] = {}
        for part in text.split(","):
            name, _, value = (piece.strip() for piece in part.partition("="))
            if name not in kinds or name in given or not value:
                raise UsageError(f"LoRA is written as in {FORM}; {part.strip()!r} is not a part of that")
            try:
                given[name] = kinds[name](value)
            except ValueError:
                raise UsageError(f"LoRA is written as in {FORM}; {value!r} is no number for {name}") from None
        r = given.get("r", 8)
        return cls(r, given.get("alpha", 2.0 * r), given.get("targets", "qkvo"), given.get("dropout", 0.0))

    def __str__(self) -> str:
        dropout = f",dropout={self.dropout:g}" if self.dropout else ""
        return f"r={self.r},alpha={self.alpha:g},targets={self.targets}{dropout}"


def need_peft() -> None:
    """Raises UsageError if peft is missing."""
    if not find_spec("peft"):
        raise UsageError("LoRA needs the package peft: pip install 'hhbench[convert]'")


def inject(model: nn.Module, settings: LoraSettings, *, train_maps: bool) -> list[str]:
    """Put adapters beside the projections of every hosted attention layer, kept ones too, and freeze the other weights.

    Still trained are: what the attentions added, if `train_maps` says so, and a classifier's head, which is new to a
    pretrained model. A language model's head is not. What was frozen before stays frozen. The adapters start as
    nothing: the model's output is unchanged. Their random half is a function of PyTorch's seed alone.

    Returns:
        The names of the adapted modules, in the model's order.

    Raises:
        UsageError: peft is missing, there is no hosted attention or an adapter already, or a layer lacks a projection.
    """
    need_peft()
    from peft import LoraConfig, inject_adapter_in_model

    if _adapters(model):
        raise UsageError(f"{type(model).__name__} has adapters already: merge them first")
    names = _targets(model, settings)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    trained = [*_new_head(model), *(attention_parameters(model) if train_maps else [])]
    trained = [parameter for parameter in trained if parameter.requires_grad]
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="|".join(map(re.escape, names)),  # whole names: peft takes a list of them for endings
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in names),
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(torch.initial_seed())
        inject_adapter_in_model(config, model)
    for parameter in trained:
        parameter.requires_grad_(True)
    model.hhbench_frozen = frozen  # type: ignore[assignment]  # a plain attribute, for merge()
    adapted = list(_adapters(model))
    if set(adapted) != set(names):
        raise HHBenchError(f"peft adapted {sorted(set(adapted) ^ set(names))} otherwise than it was asked to")
    total, learning = (
        f"{sum(p.numel() for p in model.parameters() if p.requires_grad or not only):,}" for only in (False, True)
    )
    log.info("LoRA %s adapts %d modules: %s of %s parameters are trained", settings, len(adapted), learning, total)
    return adapted


def merge(model: nn.Module) -> None:
    """Add every adapter to the weights that it stands beside, and take it out: what `inject` did is undone.

    Raises:
        UsageError: there is no adapter.
        HHBenchError: an adapter isn't finite.
    """
    adapters = _adapters(model)
    if not adapters:
        raise UsageError(f"{type(model).__name__} has no adapters to merge")
    for name, adapter in adapters.items():
        try:
            adapter.merge(safe_merge=True)
        except ValueError as error:
            raise HHBenchError(f"the adapter of {name} can't be merged: {in_one_line(error)}") from error
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, adapter.get_base_layer().train(adapter.training))
    del model.peft_config
    frozen = set(model.__dict__.pop("hhbench_frozen", ()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)


def _adapters(model: nn.Module) -> dict[str, Any]:
    """The layers of peft in a model, by the name of the module that each stands for."""
    if not find_spec("peft"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def _targets(model: nn.Module, settings: LoraSettings) -> list[str]:
    """The names of the modules to adapt, in order of depth."""
    layers = list(slots(model))
    if not layers:
        raise UsageError(f"{type(model).__name__} has no attention of hhbench whose projections LoRA could adapt")
    found: dict[str, None] = {}
    for layer in layers:
        wanted = set(settings.targets)
        fused = next((name for name in FUSED if _is_linear(model.get_submodule(layer), name)), None)
        if fused is not None and wanted & set("qkv"):
            if not wanted >= set("qkv"):
                raise UsageError(
                    f"{layer} projects q, k and v by one module, {fused}: LoRA's targets have all of them or none"
                )
            found[f"{layer}.{fused}"] = None
            wanted -= set("qkv")
        for letter in filter(wanted.__contains__, NAMES):
            found[_projection(model, layer, letter)] = None
        if "m" in wanted:
            found |= dict.fromkeys(_mlp(model, layer))
    return list(found)


def _is_linear(module: nn.Module, name: str) -> bool:
    return isinstance(getattr(module, name, None), nn.Linear | Conv1D)


def _projection(model: nn.Module, layer: str, letter: str) -> str:
    module = model.get_submodule(layer)
    for name in NAMES[letter]:
        if _is_linear(module, name):
            return f"{layer}.{name}"
    around, _, own = layer.rpartition(".")
    siblings = dict(model.get_submodule(around).named_children())
    if letter == "o" and siblings.keys() == {own, "output"} and _is_linear(siblings["output"], "dense"):
        return f"{around}.output.dense"
    raise UsageError(
        f"{type(model).__name__}: {layer} has no projection {letter} that LoRA knows "
        f"({', '.join(name for name in dict(module.named_children()))}); leave it out of the targets"
    )


def _mlp(model: nn.Module, layer: str) -> Iterator[str]:
    """The linear layers of the block around an attention layer that belong to no attention."""
    match = re.match(r"((?:.*\.)?\d+)\.", layer)
    block = match.group(1) if match else ""
    count = 0
    for part, inside in model.get_submodule(block).named_children() if match else ():
        if re.search("attn|attention", part, re.IGNORECASE):
            continue
        for name, module in inside.named_modules(prefix=f"{block}.{part}"):
            if isinstance(module, nn.Linear | Conv1D):
                count += 1
                yield name
    if not count:
        raise UsageError(f"{type(model).__name__}: {layer} has no MLP beside it that LoRA knows: leave m out")


def _new_head(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a classifier's head; none of a language model's, which was pretrained with it."""
    if isinstance(model, PreTrainedModel):
        if model.get_output_embeddings() is not None or model.base_model is model:
            return []
        base = {id(parameter) for parameter in model.base_model.parameters()}
        return [parameter for parameter in model.parameters() if id(parameter) not in base]
    timm_model: Any = model
    heads = timm_model.get_classifier() if hasattr(model, "get_classifier") else ()  # one, or a tuple of them
    return [p for head in (heads if isinstance(heads, tuple) else (heads,)) for p in head.parameters()]
