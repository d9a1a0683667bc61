"""Where host models come from, and how they are kept.

A host is built from a config, a folder, the hub or timm. A converted one is a folder: safetensors weights, the
library's own config, tokenizer or transforms, and a manifest, `hhbench.json`. Nothing that is loaded is unpickled, and
no code that a folder names is imported unasked.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from hhbench.attention import ATTENTIONS, AttentionSpec
from hhbench.data import hash_files, offline
from hhbench.errors import DataError, HHBenchError, UsageError, in_one_line, unknown_name
from hhbench.hosts import attach, placements
from hhbench.hosts.families import Entry, description, hosted_class, own_attentions
from hhbench.pretrained import source as source_of

MANIFEST = "hhbench.json"  # written last: where it is, all is there
SCHEMA = 2
SECONDS_TO_WRITE = 3600  # a folder takes less: an older one that is nobody's was left behind

_MACHINE = socket.gethostname()

_LOGGER = logging.getLogger(__name__)

DROPOUTS = (  # what transformers' configs call them
    "attention_probs_dropout_prob", "hidden_dropout_prob", "attention_dropout", "dropout", "attn_pdrop",
    "embd_pdrop", "resid_pdrop", "classifier_dropout", "seq_classif_dropout",
)  # fmt: skip


def transformers_model(auto: Any, name: str, *, pretrained: bool, dropout: float, **settings: Any) -> nn.Module:
    """A transformers model: with its weights, or from its config alone.

    Args:
        auto: the Auto class.
        name: of a packaged model (`hhbench.pretrained`) or of the hub, or a folder.
        dropout: for every dropout that the config knows.
        settings: of the config; the model's vocabulary, labels, layers.

    Raises:
        DataError: the folder or the model can't be had, or has no safetensors weights.
        UsageError: the folder holds a converted model, or one whose head is for another number of labels.
    """
    source = source_of(name)
    if Path(source).is_dir():
        check_folder(Path(source), pretrained=pretrained)
    if pretrained and "num_labels" in settings:
        _check_head(source, settings["num_labels"])
    with clear_errors(source):
        config = config_of(source, **settings)
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


def config_of(source: str, **settings: Any) -> Any:
    """The config of a model of transformers: of the hub, or of a folder. Code that it brings or names is never run.

    Raises:
        UsageError: it names code of the hub that would take the attention's place.
    """
    config = AutoConfig.from_pretrained(source, local_files_only=offline(), trust_remote_code=False, **settings)
    wanted = str(getattr(config, "_attn_implementation", None))
    if "/" in wanted:
        raise UsageError(f"{source} asks for code of the hub, {wanted}, which is not run: take it out of config.json")
    return config


def _check_head(source: str, num_labels: int) -> None:
    """A classifier's head is part of what was pretrained: it isn't thrown away unasked."""
    with clear_errors(source):
        own = config_of(source)
    if (own.architectures or [""])[0].endswith("Classification") and own.num_labels != num_labels:
        raise UsageError(
            f"{source} has a head for {own.num_labels} labels, and the data have {num_labels}: name other data, or a "
            "model without a head"
        )


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
    recipe = TimmRecipe(name, settings)
    if not pretrained:
        return recipe.build()
    _check_cached(name)
    with clear_errors(name):
        model: nn.Module = timm.create_model(name, pretrained=True, **settings)
    model.hhbench_recipe = recipe  # type: ignore[assignment]
    return model


def _check_cached(name: str) -> None:
    """Without a network timm would ask the hub again and again for what isn't there."""
    import timm
    from huggingface_hub import try_to_load_from_cache

    known = timm.models.get_pretrained_cfg(name)
    repo = getattr(known, "hf_hub_id", None)
    files = ("model.safetensors", "pytorch_model.bin", getattr(known, "hf_hub_filename", None))
    if offline() and repo and not any(isinstance(try_to_load_from_cache(repo, file), str) for file in files if file):
        raise DataError(f"the weights of {name} ({repo}) aren't in the hub's cache, and the network is switched off")


def timm_weights_hash(name: str) -> dict[str, str]:
    """What timm downloads for a name: the hub's repository and file, which timm pins."""
    import timm

    pretrained = timm.models.get_pretrained_cfg(name)
    return {name: str(getattr(pretrained, "hf_hub_id", None) or getattr(pretrained, "url", None))}


def tokenizer(name: str) -> Any:
    """The fast tokenizer of a packaged model, of a folder or of a hub's name.

    Raises:
        DataError: it can't be had, or the folder holds none.
    """
    source = source_of(name)
    folder = Path(source)
    if not folder.is_dir():
        with clear_errors(source):
            return AutoTokenizer.from_pretrained(
                source, local_files_only=offline(), use_fast=True, trust_remote_code=False
            )
    if not any(path.name.startswith(("tokenizer", "vocab")) or path.suffix == ".model" for path in folder.iterdir()):
        raise DataError(f"{source} holds no tokenizer, without which it can't read text: save the model's own there")
    try:
        return AutoTokenizer.from_pretrained(source, local_files_only=True, use_fast=True, trust_remote_code=False)
    except (OSError, ValueError, RuntimeError, KeyError, AttributeError) as error:
        raise DataError(f"the tokenizer in {source} can't be read ({in_one_line(error)})") from error


def weights_hash(name: str) -> dict[str, str]:
    """The sha256 of a packaged model's or a folder's weights, by its own name; a hub model's commit."""
    source = source_of(name)
    folder = Path(source)
    if folder.is_dir():
        return {Path(name).absolute().name: hash_files(sorted(folder.glob("*.safetensors")))}  # its place says nothing
    with clear_errors(source):
        commit = config_of(source)._commit_hash
    return {name: str(commit)}


@contextlib.contextmanager
def clear_errors(source: str) -> Iterator[None]:
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


def check_folder(folder: Path, *, pretrained: bool) -> None:
    """Say what a model's folder lacks before the library says it in its own words.

    Raises:
        DataError: it has no config, or no safetensors weights where `pretrained` asks for them.
        UsageError: it holds a converted model.
    """
    if is_converted(folder):
        raise UsageError(f"{folder} holds a converted model: read it with hhbench.load, or name what it was made from")
    if not (folder / "config.json").is_file():
        raise DataError(f"{folder} holds no model: it has no config.json")
    if pretrained and not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        raise DataError(
            f"{folder} has pickled weights alone ({pickled[0]}), which can run code when they are read: save the model "
            "again as safetensors"
            if pickled
            else f"{folder} has no weights: there is no .safetensors file"
        )


def check_finite(model: nn.Module) -> None:
    """Refuse a model with NaN or infinity among its weights.

    Raises:
        HHBenchError: there is one; the message names the first such tensor.
    """
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise HHBenchError(f"{name} of {type(model).__name__} isn't finite: the weights hold NaN or infinity")


@dataclass(frozen=True)
class TimmRecipe:
    """How to build a timm model without its weights: what a saved folder must say of one.

    Attributes:
        name: timm's.
        arguments: of `timm.create_model`.
    """

    name: str
    arguments: dict[str, Any]

    def build(self) -> nn.Module:
        """The model with random weights."""
        import timm

        # A folder that somebody else made may describe a model, but not where to load code or pickles from.
        if self.name not in timm.list_models() or {"checkpoint_path", "pretrained"} & self.arguments.keys():
            raise UsageError(f"timm model {self.name!r} with {sorted(self.arguments)} is not taken from a manifest")
        model: nn.Module = timm.create_model(self.name, pretrained=False, **self.arguments)
        model.hhbench_recipe = self  # type: ignore[assignment]  # a plain attribute, for save()
        return model


def save(
    model: nn.Module, folder: str | Path, *, notes: Mapping[str, Any] | None = None, processor: Any = None
) -> None:
    """Write a converted model as a folder, whole or not at all. A folder that is there is replaced.

    A model of transformers is written by its own `save_pretrained`, so that the Auto classes can load it after
    `import hhbench.hosts`; one of timm can be loaded by `hhbench.load` alone.

    Args:
        notes: anything else to keep in the manifest, as plain JSON.
        processor: a tokenizer or an image processor: what has `save_pretrained`.

    Raises:
        UsageError: the model wasn't converted, or nothing could build it again.
        HHBenchError: writing failed; what was there before is as it was.
    """
    folder = Path(folder)
    host = _host_of(model)
    with _written_aside(folder) as aside, _no_progress_bars():
        if isinstance(model, PreTrainedModel):
            model.save_pretrained(aside)
        else:
            state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
            save_file(state, aside / "model.safetensors")
        if processor is not None:
            processor.save_pretrained(aside)
        manifest = {
            **(notes or {}),
            "schema": SCHEMA,
            "host": host,
            **description(model),
            "weights_sha256": _weights_sha256(aside),
        }
        (aside / MANIFEST).write_text(json.dumps(manifest, indent=1))


def load(folder: str | Path, *, attn: str | Mapping[str, str] | None = None) -> nn.Module:
    """A converted model, in evaluation mode.

    Args:
        folder: what `hhbench convert` or a run wrote (a run's `model` folder, or a teacher's).
        attn: a user's own attention, which a folder may not import by itself: `file.py:Class` or a dotted path. Where
            the layers have several, each by the name under which it was saved.

    Raises:
        HHBenchError: the folder is no hhbench model, is damaged, or its weights don't fit.
        UsageError: it was converted with a user's own attention, and `attn` doesn't say where that is.
    """
    folder = model_folder(Path(folder))
    found = manifest(folder)
    try:
        sha256, host = found["weights_sha256"], found["host"]
        entries = [Entry.parse(said) for said in found["layers"]]
        library, name = host["library"], host["name"]
        recipe = TimmRecipe(name, host["arguments"]) if library == "timm" else None
    except (KeyError, TypeError, AttributeError) as error:
        raise HHBenchError(f"{folder / MANIFEST} lacks what describes a model: {error}") from error
    if not any(folder.glob("*.safetensors")) or _weights_sha256(folder) != sha256:
        raise HHBenchError(f"the weights in {folder} are missing or damaged: their sha256 isn't the manifest's")
    with own_attentions(_own_specs(folder, entries, attn)), _no_progress_bars():
        try:
            if recipe is not None:
                model = _load_timm(recipe, entries, folder)
            elif library == "transformers":
                model = _load_transformers(name, folder)
            else:
                raise UsageError(f"no host library {library!r}; it is transformers or timm")
        except UsageError:
            raise
        except (HHBenchError, RuntimeError, SafetensorError, OSError, ValueError, AttributeError) as error:
            raise HHBenchError(
                f"what {folder} holds doesn't fit the model that is described there: {in_one_line(error)}"
            ) from error
    return model.eval()


def manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder that `save` wrote.

    Raises:
        HHBenchError: there is none, or it can't be read.
    """
    path = model_folder(Path(folder)) / MANIFEST
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        raise HHBenchError(f"{folder} holds no hhbench model: {MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise HHBenchError(f"{path} can't be read: {error}") from error
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        raise HHBenchError(
            f"{path} has schema {schema!r}, and this hhbench reads {SCHEMA}: delete that folder and make it again"
        )
    return found


def is_converted(folder: str | Path) -> bool:
    """Whether a folder holds a model that hhbench converted."""
    if (model_folder(Path(folder)) / MANIFEST).is_file():
        return True
    try:
        said = json.loads((Path(folder) / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(said, dict) and str(said.get("model_type")).startswith("hhbench-")


def model_folder(folder: Path) -> Path:
    """A run and a teacher keep their model in a folder of their own."""
    inside = folder / "model"
    return inside if not (folder / MANIFEST).exists() and (inside / MANIFEST).exists() else folder


def _weights_sha256(folder: Path) -> str:
    return hash_files(sorted(folder.glob("*.safetensors")))


def _host_of(model: nn.Module) -> dict[str, Any]:
    """How to build a model again, as plain JSON."""
    name = type(model).__name__
    if not placements(model):
        raise UsageError(f"{name} wasn't converted: hhbench.save keeps converted models, its own library keeps others")
    recipe = getattr(model, "hhbench_recipe", None)
    if isinstance(recipe, TimmRecipe):
        return {"library": "timm"} | dataclasses.asdict(recipe)
    if isinstance(model, PreTrainedModel):
        original = name.removeprefix("HHBench")
        if _class_of_transformers(original) is not None:
            return {"library": "transformers", "name": original}
    raise UsageError(f"{name} can't be saved: neither hhbench nor transformers built it, so nothing says how to")


def _class_of_transformers(name: str) -> type[PreTrainedModel] | None:
    cls = getattr(transformers, name, None)
    return cls if isinstance(cls, type) and issubclass(cls, PreTrainedModel) else None


def _own_specs(folder: Path, entries: list[Entry], attn: str | Mapping[str, str] | None) -> dict[str, AttentionSpec]:
    """What the user says the users' own attentions of a folder are; a warning where they have changed since."""
    own = {entry.placement.attention: entry.own.get("sha256") for entry in entries if entry.own is not None}
    if attn is not None and not own:
        raise UsageError(f"{folder} was converted with hhbench's own attentions: leave attn={attn!r} out")
    if isinstance(attn, str):
        if len(own) > 1:
            raise UsageError(f"{folder} has several attentions of users' own: say what each is, {sorted(own)}")
        attn = dict.fromkeys(own, attn)
    specs = {name: ATTENTIONS.get(reference) for name, reference in (attn or {}).items()}
    for name, sha256 in own.items():
        if name in specs and specs[name].source_hash() != sha256:
            _LOGGER.warning("%s has changed: its source isn't the one that %s was converted with", name, folder)
    return specs


def _load_transformers(name: str, folder: Path) -> nn.Module:
    cls = _class_of_transformers(name)
    if cls is None:
        raise UsageError(f"transformers has no model class {name!r}")
    hosted = hosted_class(cls)  # which also makes its family's config known
    config_of(str(folder))
    model, info = hosted.from_pretrained(folder, local_files_only=True, use_safetensors=True, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise HHBenchError(
                f"the weights in {folder} don't fit the model that is described there: {kind} {info[kind]}"
            )
    return model  # type: ignore[no-any-return]


def _load_timm(recipe: TimmRecipe, entries: list[Entry], folder: Path) -> nn.Module:
    model = recipe.build()
    for entry in entries:
        attach(model, entry.placement, entry.build())
    state = load_file(folder / "model.safetensors")
    for key, tensor in model.state_dict(keep_vars=True).items():
        if key in state:
            tensor.data = tensor.data.to(state[key].dtype)  # half precision comes back as it was saved
    model.load_state_dict(state)
    return model


@contextlib.contextmanager
def _written_aside(folder: Path) -> Iterator[Path]:
    """A new folder that takes the place of this one once it is complete."""
    new, old = (folder.with_name(f".{folder.name}.{_MACHINE}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        new.mkdir(parents=True)
        yield new
        if folder.exists():
            folder.rename(old)
            os.utime(old)  # a rename leaves a folder its age, by which it would be taken for a leftover
        try:
            new.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
        with contextlib.suppress(OSError):
            _clear_leftovers(folder)
    except HHBenchError:
        raise
    except Exception as error:  # safetensors and tokenizers have their own for a full disk
        raise HHBenchError(f"{folder} couldn't be written: {in_one_line(error)}") from error
    finally:
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def _clear_leftovers(folder: Path) -> None:
    """Delete what was written aside for this folder by processes of this machine that were killed over it. One may live
    where this process can't see it, in another container of the same name: what is young stays.
    """
    name = re.compile(rf"\.{re.escape(folder.name)}\.{re.escape(_MACHINE)}\.(\d{{1,9}})\.(new|old)")
    for path in folder.parent.iterdir():
        found = name.fullmatch(path.name)
        if found and not _lives(int(found[1])) and time.time() - path.lstat().st_mtime > SECONDS_TO_WRITE:
            shutil.rmtree(path, ignore_errors=True)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is somebody else's
        pass
    return True


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """transformers shows one for each file that it reads or writes."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
