"""hhbench doctor: what this machine has."""

import argparse
import shutil
from importlib.util import find_spec

from hhbench.commands.shown import print_table

HELP = "what this machine has, and what hhbench will use"
EXAMPLES = "examples:\n  hhbench doctor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def call(args: argparse.Namespace) -> int:
    import platform

    import torch

    from hhbench import data, result

    versions = result.environment(device="", world_size=1, threads=torch.get_num_threads(), precision="")["versions"]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cache = data.cache_dir()
    rows = [
        ("python", platform.python_version(), ""),
        *((name, version, "") for name, version in sorted(versions.items())),
        ("devices", ", ".join(gpus) or ("Apple MPS" if torch.backends.mps.is_available() else "CPU"), ""),
        ("cpu threads", torch.get_num_threads(), "OMP_NUM_THREADS changes it"),
        ("flash-attn", _there("flash_attn"), "softmax on CUDA in half precision; torch's SDPA otherwise"),
        ("flash-linear-attention", _there("fla"), "linear attention on CUDA in half precision; HHBENCH_FLA=0: without"),
        ("pip", _there("pip"), "fetches pinned data; without it, put files into the cache by hand"),
        ("cache", cache, f"{shutil.disk_usage(cache).free / 1e9:.0f} GB free; HHBENCH_CACHE moves it"),
        ("network", "off (offline switch)" if data.offline() else "allowed", "HHBENCH_OFFLINE=1 forbids it"),
        ("matplotlib", _there("matplotlib"), "plots"),
        ("peft", _there("peft"), "--lora; comes with the extra `convert`"),
        ("gguf, onnx", ", ".join(map(_there, ("gguf", "onnx"))), "smollm2 and dinov2, once; the same extra"),
    ]
    print_table(("what", "found", "note"), rows)
    return 0


def _there(package: str) -> str:
    return "installed" if find_spec(package) else "not installed"
