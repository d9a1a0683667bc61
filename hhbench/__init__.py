"""hhbench: a benchmark suite for attention.

Four calls do the work of the command line from Python:

    hhbench.build_attention("hedgehog", shape)     an attention module
    hhbench.convert(model, "hedgehog")             a pretrained model with its softmax replaced
    hhbench.run(config)                            one benchmark run, and its result
    hhbench.load(folder)                           a model that a run saved

Nothing heavy is imported until one of them is called.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["build_attention", "convert", "load", "run"]

# In a checkout that is not installed, tasks/ and baselines/ lie beside this folder, not in it.
if not (Path(__file__).parent / "tasks").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

if TYPE_CHECKING:
    from hhbench.attention import build_attention
    from hhbench.hosts import convert
    from hhbench.models import load
    from hhbench.runner import run


def __getattr__(name: str) -> Any:
    import importlib

    homes = {"build_attention": "attention", "convert": "hosts", "load": "models", "run": "runner"}
    if name not in homes:
        raise AttributeError(f"module 'hhbench' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hhbench.{homes[name]}"), name)
