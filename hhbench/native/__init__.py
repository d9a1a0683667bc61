"""A compiled form of the causal linear attention on a CPU, where a C compiler is found and asked for.

HHBENCH_NATIVE=1 asks for it. The C files beside this one are compiled on first use into the cache and loaded from
there. Where they can't be, or don't serve some tensors, callers get None or False and take the form that they have.
Hedgehog's attention has a backward pass too and takes bfloat16, multiplied in AMX where the CPU has it; sums over
blocks of any other features are of float32, without gradients. One token of Hedgehog's after a state:
`hhbench.native.step`.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hhbench.data import cache_dir
from hhbench.errors import HHBenchError, in_one_line
from hhbench.kernels import ran

log = logging.getLogger("hhbench")

FOLDER = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
MOST = 128  # of D, E and half of F
DIGEST = hashlib.sha256().digest_size  # bytes behind the library that say it is whole
PATIENCE = 120  # seconds for the compiler


class _Attention(ctypes.Structure):
    """`Attention` of linear_attention.c, which says what is what."""

    INPUTS = ("q", "k", "v", "attended", "wq", "wk", "bq", "bk")
    OTHERS = ("out", "of_den", "starts", "d_out", "dq", "dk", "dv", "dwq", "dwk", "dbq", "dbk")
    SIZES = ("B", "H", "G", "N", "D", "half", "E", "wq_heads", "wk_heads", "bf16")
    _fields_ = [(name, ctypes.c_void_p) for name in (*INPUTS, *OTHERS)] + [(name, ctypes.c_long) for name in SIZES]


def hedgehog(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    query_bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    *,
    key_mask: Tensor | None = None,
) -> Tensor | None:
    """Causal attention [B, H, N, E] through [softmax(x W), softmax(-x W)], or None where this can't serve the tensors.

    Args:
        q, k, v: [B, H, N, D], [B, G, N, D], [B, G, N, E]; all float32 or all bfloat16.
        query_weight, key_weight: [heads, D, F / 2]; heads is 1, H, or G for keys.
        query_bias, key_bias: [heads, 1, F / 2], both or none.
        key_mask: bool [B, N], False where a token is padded; none = no token is.
    """
    learned = [query_weight, key_weight, query_bias, key_bias]
    given = [q, k, v, *(x for x in learned if x is not None)]
    if not _serves(given, torch.float32, torch.bfloat16) or len({x.dtype for x in (q, k, v)}) > 1:
        return None
    half = query_weight.shape[2]
    if q.shape[2] != k.shape[2] or max(q.shape[3], half, v.shape[3]) > MOST or key_weight.shape[2] != half:
        return None
    if (query_bias is None) != (key_bias is None) or library() is None:
        return None
    whole = [None if x is None else x.contiguous() for x in (q, k, v, key_mask)]
    exact = [None if x is None else x.float().contiguous() for x in learned]
    out: Tensor = _Hedgehog.apply(torch.is_grad_enabled(), *whole, *exact)
    return out


class _Hedgehog(torch.autograd.Function):
    """(keep, q, k, v, key_mask, both W, both biases) -> out. Features are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, keep: bool, *given: Tensor | None) -> Tensor:
        q, _, v, _, weight, *_ = given
        assert q is not None and v is not None and weight is not None
        (B, H, N, _), E = q.shape, v.shape[3]
        made = {"out": q.new_empty(B, H, N, E)}
        if keep and any(ctx.needs_input_grad):
            made["of_den"] = weight.new_empty(B, H, N)
            blocks = -(-N // _loaded().tokens_between_starts())
            made["starts"] = weight.new_empty(B, H, blocks, 2 * weight.shape[2], E + 1)
            ctx.save_for_backward(*given, *made.values())
        attention = _attention(given, made)
        ran("native amx" if _loaded().is_rounded(ctypes.byref(attention)) else "native")
        _call("hedgehog", attention)
        return made["out"]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        *given, out, of_den, starts = ctx.saved_tensors
        q, k, v, _, query_weight, key_weight, *_ = given
        B, H, N, D = q.shape
        half = query_weight.shape[2]
        _, *wanted = ctx.needs_input_grad
        made = {"out": out, "of_den": of_den, "starts": starts, "d_out": d_out.contiguous()}
        # One gradient for each query head: heads that share what it is of have theirs added up, in float32.
        of_keys = q if k.shape[1] == H else of_den
        for name, wants, like, shape in (
            ("dq", wanted[0], q, (N, D)),
            ("dk", wanted[1], of_keys, (N, D)),
            ("dv", wanted[2], of_keys, (N, v.shape[3])),
            ("dwq", wanted[4], of_den, (half, D)),
            ("dwk", wanted[5], of_den, (half, D)),
            ("dbq", wanted[6], of_den, (half,)),
            ("dbk", wanted[7], of_den, (half,)),
        ):
            if wants:
                made[name] = like.new_empty(B, H, *shape)
        _call("hedgehog_back", _attention(given, made))
        of_tokens = [
            None if name not in made else _added_up(made[name], x.shape[1], 1).to(x.dtype)
            for name, x in (("dq", q), ("dk", k), ("dv", v))
        ]
        of_maps = [
            None if name not in made else _added_up(made[name].sum(0), weight.shape[0], 0)
            for name, weight in zip(("dwq", "dwk", "dbq", "dbk"), (query_weight, key_weight) * 2, strict=True)
        ]
        of_weights = [None if x is None else x.mT for x in of_maps[:2]]
        of_biases = [None if x is None else x[:, None] for x in of_maps[2:]]
        return None, *of_tokens, None, *of_weights, *of_biases


def _added_up(each: Tensor, heads: int, dim: int) -> Tensor:
    """What so many heads receive, from what each query head did."""
    if each.shape[dim] == heads:
        return each
    return each.view(*each.shape[:dim], heads, -1, *each.shape[dim + 1 :]).sum(dim + 1)


def _attention(given: Sequence[Tensor | None], made: dict[str, Tensor]) -> _Attention:
    """What the C functions take."""
    q, k, v, _, query_weight, key_weight, *_ = given
    assert q is not None and k is not None and v is not None and query_weight is not None and key_weight is not None
    sizes = *q.shape[:2], k.shape[1], *q.shape[2:], query_weight.shape[2], v.shape[3]
    sizes = *sizes, query_weight.shape[0], key_weight.shape[0], q.dtype == torch.bfloat16
    return _Attention(
        **{key: _address(x) for key, x in zip(_Attention.INPUTS, given, strict=True)},
        **{key: _address(x) for key, x in made.items()},
        **dict(zip(_Attention.SIZES, sizes, strict=True)),
    )


def _call(name: str, attention: _Attention) -> None:
    """Run one of the C functions that take an `Attention`."""
    if getattr(_loaded(), name)(ctypes.byref(attention), ctypes.c_long(torch.get_num_threads())):
        raise MemoryError("no memory for the compiled linear attention")


def _loaded() -> ctypes.CDLL:
    """The library, by those who are called because there is one."""
    compiled = library()
    assert compiled is not None
    return compiled


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
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return False
    if (
        not _serves([*given, out], torch.float32)
        or F > 2 * MOST
        or E > MOST
        or not all(x.is_contiguous() for x in given)
    ):
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
    """The compiled C files, or None, with a line in the debug log, where there is none."""
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


def observed() -> bool:
    """Whether torch compiles, traces, transforms or differentiates forwards: it doesn't see what C writes."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _serves(tensors: Sequence[Tensor], *dtypes: torch.dtype) -> bool:
    if not wanted() or observed():
        return False
    return all(x.dtype in dtypes and x.device.type == "cpu" and x.numel() for x in tensors)


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
    sources = [path.read_text() for path in sorted(FOLDER.glob("*.[ch]"))]
    made_of = [*sources, *_compiler(), version.stdout, *FLAGS, platform.machine(), *cpu, str(os.getuid())]
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
        command = [*_compiler(), *FLAGS, *map(str, sorted(FOLDER.glob("*.c"))), "-o", str(made)]
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE)
        with made.open("ab") as file:
            file.write(hashlib.sha256(made.read_bytes()).digest())
        made.replace(path)
