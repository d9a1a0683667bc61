"""Where host models come from, and how they are kept.

A host is built from a config, a folder, the hub or timm, and saved as safetensors beside a manifest that says how to
build it again. Nothing that is loaded is unpickled, and no code that a folder names is imported unasked.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hhbench.attention import ATTENTIONS
from hhbench.data import hash_files, offline
from hhbench.errors import DataError, HHBenchError, UsageError, unknown_name
from hhbench.hosts import convert

DROPOUTS = (  # what transformers' configs call them
    "attention_probs_dropout_prob", "hidden_dropout_prob", "attention_dropout", "dropout", "attn_pdrop",
    "embd_pdrop", "resid_pdrop", "classifier_dropout", "seq_classif_dropout",
)  # fmt: skip


def transformers_model(auto: Any, source: str, *, pretrained: bool, dropout: float, **settings: Any) -> nn.Module:
    """A transformers model from a folder or a hub's name: with its weights, or from its config alone.

    Args:
        auto: the Auto class.
        source: a folder or a name of the hub.
        dropout: for every dropout that the config knows.
        settings: of the config; the model's vocabulary, labels, layers.

    Raises:
        DataError: the folder or the model can't be had, or has no safetensors weights.
    """
    with _clear_errors(source):
        config = AutoConfig.from_pretrained(source, local_files_only=offline(), **settings)
        for name in DROPOUTS:
            if hasattr(config, name):
                setattr(config, name, dropout)
        if not pretrained:
            model: nn.Module = auto.from_config(config)
            return model
        # Weights come as safetensors or not at all: a pickle may run code.
        model = auto.from_pretrained(
            source, config=config, local_files_only=offline(), use_safetensors=True, dtype=torch.float32
        )
    return model


def gpt2(
    name: str,
    *,
    vocab: int,
    max_len: int,
    dropout: float,
    mlp_ratio: int = 4,
    initializer_range: float = 0.02,
    sinusoidal: float | None = None,
) -> nn.Module:
    """A GPT-2 with random weights: `gpt2-LAYERSxWIDTHxHEADS`.

    Args:
        initializer_range: standard deviation of its weights. GPT-2's own 0.02 is for models a hundred times wider:
            small ones take long to begin to attend.
        sinusoidal: start the learned positions from the sinusoids of Vaswani et al. (2017), this large, instead.

    Raises:
        UsageError: the name isn't of that form, or the heads don't divide the width.
    """
    match = re.fullmatch(r"gpt2-(\d+)x(\d+)x(\d+)", name)
    if match is None:
        raise UsageError(f"model {name!r} is not gpt2-LAYERSxWIDTHxHEADS, as in gpt2-2x64x2")
    layers, width, heads = map(int, match.groups())
    if not layers or not heads or width % heads:
        raise UsageError(f"model {name!r}: {heads} heads can't share a width of {width}")
    model: nn.Module = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab,
            n_positions=max_len,
            n_layer=layers,
            n_embd=width,
            n_head=heads,
            n_inner=mlp_ratio * width,
            attn_pdrop=dropout,
            embd_pdrop=dropout,
            resid_pdrop=0.0,
            initializer_range=initializer_range,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    if sinusoidal is not None:
        angles = torch.arange(max_len)[:, None] * 1000.0 ** (-torch.arange(0, width, 2) / width)
        waves = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width]
        model.transformer.wpe.weight.data.copy_(sinusoidal * waves)  # type: ignore[union-attr, operator]
    return model


def timm_model(name: str, *, pretrained: bool, **settings: Any) -> nn.Module:
    """A timm model by name, with its weights from the hub or without.

    Raises:
        UsageError: timm has no such model (the nearest name is offered), or it takes no such setting.
        DataError: its weights can't be had.
    """
    import timm

    if name.split(".")[0] not in timm.list_models():
        raise unknown_name("timm model", name, timm.list_models("*vit*"))
    recipe = HostRecipe("timm", name, settings)
    if not pretrained:
        return recipe.build()
    with _clear_errors(name):
        model: nn.Module = timm.create_model(name, pretrained=True, **settings)
    model.hhbench_recipe = recipe  # type: ignore[assignment]
    return model


def timm_weights_hash(name: str) -> dict[str, str]:
    """What timm downloads for a name: the hub's repository and file, which timm pins."""
    import timm

    pretrained = timm.models.get_pretrained_cfg(name)
    return {name: str(getattr(pretrained, "hf_hub_id", None) or getattr(pretrained, "url", None))}


def tokenizer(source: str) -> Any:
    """The fast tokenizer of a folder or of a hub's name."""
    with _clear_errors(source):
        return AutoTokenizer.from_pretrained(source, local_files_only=offline(), use_fast=True)


def weights_hash(name: str, source: str) -> dict[str, str]:
    """The sha256 of the weights in a folder, by the name that the user knows; a hub model's commit."""
    folder = Path(source)
    if folder.is_dir():
        return {name: hash_files(sorted(folder.glob("*.safetensors")))}
    with _clear_errors(source):
        commit = AutoConfig.from_pretrained(source, local_files_only=offline())._commit_hash
    return {name: str(commit)}


@contextlib.contextmanager
def _clear_errors(source: str) -> Iterator[None]:
    """What the libraries say of a model that isn't there is a page long."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        where = "a folder or a name that the hub's cache has" if offline() else "a folder or a name of the hub"
        raise DataError(
            f"model {source!r} can't be loaded; --model takes {where}, with safetensors weights "
            f"({lines[0] if lines else type(error).__name__})"
        ) from error


@dataclass(frozen=True)
class HostRecipe:
    """How to build a host without its weights: what a saved folder must say.

    Attributes:
        library: "transformers" or "timm".
        name: the model class of transformers, or the model name of timm.
        arguments: the config of transformers as a dict, or timm's keyword arguments.
    """

    library: str
    name: str
    arguments: dict[str, Any]

    def build(self) -> nn.Module:
        """The host with random weights."""
        if self.library == "timm":
            import timm

            # A folder that somebody else made may describe a model, but not where to load code or pickles from.
            if self.name not in timm.list_models() or {"checkpoint_path", "pretrained"} & self.arguments.keys():
                raise UsageError(f"timm model {self.name!r} with {sorted(self.arguments)} is not taken from a manifest")
            model: nn.Module = timm.create_model(self.name, pretrained=False, **self.arguments)
        elif self.library == "transformers":
            cls = getattr(importlib.import_module("transformers"), self.name, None)
            if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
                raise UsageError(f"transformers has no model class {self.name!r}")
            model = cls(cls.config_class.from_dict(self.arguments))  # type: ignore[attr-defined]
        else:
            raise UsageError(f"no host library {self.library!r}; it is transformers or timm")
        model.hhbench_recipe = self  # type: ignore[assignment]  # a plain attribute, for save()
        return model


def recipe_of(model: nn.Module) -> HostRecipe:
    """How to build this host again."""
    recipe = getattr(model, "hhbench_recipe", None)
    if isinstance(recipe, HostRecipe):
        return recipe
    if isinstance(model, PreTrainedModel):
        arguments = model.config.to_dict()
        arguments.pop("quantization_config", None)
        return HostRecipe("transformers", type(model).__name__, json.loads(json.dumps(arguments, default=str)))
    raise UsageError(f"{type(model).__name__} can't be saved: hhbench didn't build it, so it can't say how to")


def save(
    model: nn.Module,
    folder: Path,
    *,
    attn: str,
    options: Mapping[str, Any],
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write a hosted model: `model.safetensors`, and `hhbench.json`, which comes last and says that all is there.

    Args:
        attn: the name of the attention as the user gave it.
        notes: anything else to keep in the manifest, as plain JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hhbench.json").unlink(missing_ok=True)
    weights = folder / "model.safetensors"
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
    save_file(state, weights)
    manifest = {
        "schema": 1,
        "host": dataclasses.asdict(recipe_of(model)),
        "attention": {
            "name": attn,
            "options": dict(options),
            "source_sha256": ATTENTIONS.get(attn).source_hash(),
        },
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        **(notes or {}),
    }
    aside = folder / "hhbench.json.tmp"
    aside.write_text(json.dumps(manifest, indent=1))
    aside.replace(folder / "hhbench.json")


def manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder that `save` wrote.

    Raises:
        HHBenchError: there is none, or it can't be read.
    """
    path = folder / "hhbench.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise HHBenchError(f"{folder} holds no hhbench model: hhbench.json is missing") from None
    except (OSError, ValueError) as error:
        raise HHBenchError(f"{path} can't be read: {error}") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != 1:
        raise HHBenchError(f"{path} has schema {schema!r}; this hhbench reads 1")
    return found


def load(folder: str | Path, *, attn: str | None = None) -> nn.Module:
    """The model of a folder that a run saved, in evaluation mode.

    Args:
        folder: holds `hhbench.json` and `model.safetensors` (a run's `model` folder, or a teacher).
        attn: a user's own attention, which a folder may not name by itself: `file.py:Class`.

    Raises:
        HHBenchError: the folder is no hhbench model, is damaged, or its weights don't fit.
    """
    folder = Path(folder)
    if not (folder / "hhbench.json").exists() and (folder / "model" / "hhbench.json").exists():
        folder = folder / "model"
    found = manifest(folder)
    try:
        sha256, recipe = found["weights_sha256"], HostRecipe(**found["host"])
        name, options = found["attention"]["name"], found["attention"]["options"]
    except (KeyError, TypeError) as error:
        raise HHBenchError(f"{folder / 'hhbench.json'} lacks what describes a model: {error}") from error
    weights = folder / "model.safetensors"
    if not weights.is_file() or hashlib.sha256(weights.read_bytes()).hexdigest() != sha256:
        raise HHBenchError(f"{weights} is missing or damaged: its sha256 isn't the manifest's. Make the model again.")
    model = recipe.build()
    convert(model, ATTENTIONS.get(attn) if attn else ATTENTIONS.get(name, allow_code=False), **options)
    try:
        state = load_file(weights)
        for key, tensor in model.state_dict(keep_vars=True).items():
            if key in state:
                tensor.data = tensor.data.to(state[key].dtype)  # half precision comes back as it was saved
        model.load_state_dict(state)
    except (RuntimeError, SafetensorError) as error:
        raise HHBenchError(f"{weights} doesn't fit the model that its manifest describes: {error}") from error
    return model.eval()
