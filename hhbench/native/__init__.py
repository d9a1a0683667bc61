"""A compiled form of the causal linear attention's forward pass on a CPU, where a C compiler is found and asked for.

HHBENCH_NATIVE=1 asks for it. `linear_attention.c` is compiled on first use into the cache and loaded from there. Where
it can't be, or doesn't serve some tensors, callers get None or False and take the form that they have. No gradients.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from hhbench.data import cache_dir
from hhbench.errors import HHBenchError, in_one_line
from hhbench.kernels import ran

log = logging.getLogger("hhbench")

SOURCE = Path(__file__).parent / "linear_attention.c"
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
MOST = 128  # of D, E and half of F
DIGEST = hashlib.sha256().digest_size  # bytes behind the library that say it is whole
PATIENCE = 120  # seconds for the compiler


def hedgehog(
    q: Tensor, k: Tensor, v: Tensor, query_weight: Tensor, key_weight: Tensor, *biases: Tensor | None
) -> Tensor | None:
    """Causal attention [B, H, N, E] through [softmax(x W), softmax(-x W)], or None where this can't serve the tensors.

    Args:
        q, k, v: [B, H, N, D], [B, G, N, D], [B, G, N, E].
        query_weight, key_weight: [heads, D, F / 2]; heads is 1, H, or G for keys.
        biases: of queries and keys, [heads, 1, F / 2]; none, or both None, without.
    """
    bias_q, bias_k = biases or (None, None)
    given = [x for x in (q, k, v, query_weight, key_weight, bias_q, bias_k) if x is not None]
    half = query_weight.shape[2]
    if not _serves(given) or max(q.shape[3], half, v.shape[3]) > MOST or key_weight.shape[2] != half:
        return None
    if (bias_q is None) != (bias_k is None) or (compiled := library()) is None:
        return None
    (B, H, N, D), G, E = q.shape, k.shape[1], v.shape[3]
    out = q.new_empty(B, H, N, E)
    whole = [None if x is None else x.contiguous() for x in (q, k, v, query_weight, key_weight, bias_q, bias_k)]
    sizes = B, H, G, N, D, half, E, query_weight.shape[0], key_weight.shape[0], torch.get_num_threads()
    if compiled.hedgehog(*map(_address, (*whole, out)), *map(ctypes.c_long, sizes)):
        return None
    ran("native")
    return out


def block(queries: Tensor, keys: Tensor, values: Tensor, sums: Tensor, out: Tensor, *, first: bool, last: bool) -> bool:
    """One block of the sum over any features; False, and nothing done, where this can't serve the tensors.

    Args:
        queries, keys: features [L, n, F].
        values: [v, 1], [L, n, E + 1].
        sums: [L, F, E + 1]: read unless the block is the first, written unless it is the last.
        out: [b, H, n, E], some tokens of a contiguous tensor.
    """
    (L, n, F), E = queries.shape, out.shape[3]
    given = [queries, keys, values, sums]
    if not _serves([*given, out]) or F > 2 * MOST or E > MOST or not all(x.is_contiguous() for x in given):
        return False
    if (compiled := library()) is None:
        return False
    sizes = L, n, F, E, out.stride(1)
    ends = map(ctypes.c_int, (first, last))
    failed = compiled.features(
        *map(_address, (*given, out)), *map(ctypes.c_long, sizes), *ends, ctypes.c_long(torch.get_num_threads())
    )
    if failed:
        return False
    ran("native")
    return True


def wanted() -> bool:
    return os.environ.get("HHBENCH_NATIVE") == "1"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None, with a line in the debug log, where there is none."""
    if os.name != "posix":
        log.debug("no compiled linear attention: it needs POSIX threads")
        return None
    try:
        path = _path()
        found = _load(path)
        if found is None:
            _compile(path)
            found = _load(path)
        if found is None:
            log.debug("no compiled linear attention: %s can't be loaded", path)
        return found
    except (HHBenchError, OSError, subprocess.SubprocessError, ValueError) as error:
        said = (getattr(error, "stderr", None) or "").strip().splitlines()  # the compiler's own words
        log.debug("no compiled linear attention: %s", said[0] if said else in_one_line(error))
    return None


def _serves(tensors: list[Tensor]) -> bool:
    if not wanted() or torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return False
    return all(x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() for x in tensors)


def _address(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CC") or "cc")


def _path() -> Path:
    """The library's name says all that it was made from, and whose it is: a user loads no other user's code."""
    version = subprocess.run([*_compiler(), "--version"], capture_output=True, text=True, check=True, timeout=PATIENCE)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else [platform.processor()]
    cpu = sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))} or lines)
    made_of = [SOURCE.read_text(), *_compiler(), version.stdout, *FLAGS, platform.machine(), *cpu, str(os.getuid())]
    return cache_dir() / "native" / f"{hashlib.sha256(chr(0).join(made_of).encode()).hexdigest()[:32]}.so"


def _load(path: Path) -> ctypes.CDLL | None:
    """None where there is none, or it is not whole, or somebody else's."""
    if not path.exists() or path.stat().st_uid != os.getuid():
        return None
    content = path.read_bytes()
    if hashlib.sha256(content[:-DIGEST]).digest() != content[-DIGEST:]:
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


def _compile(path: Path) -> None:
    """Written aside and renamed: another process sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / "made.so"
        command = [*_compiler(), *FLAGS, str(SOURCE), "-o", str(made)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
        with made.open("ab") as file:
            file.write(hashlib.sha256(made.read_bytes()).digest())
        made.replace(path)
