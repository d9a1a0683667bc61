"""Runs what sums linear attentions on this machine's GPU: against the truth first, then against softmax's kernels.

    python scripts/gpu_checks.py                 # ten to fifteen minutes; writes docs/results/gpu/<card>.json
    python scripts/gpu_checks.py --tokens 8192   # smaller, to try it

Outputs and gradients are compared with the quadratic form in float64: the fused Hedgehog kernels', and those of every
linear attention by all chunks at once and, where it is installed, by flash-linear-attention; and all three late in a
sequence of 32,768 tokens. Then, at the same number of tokens in all, forward and forward with backward are timed for
each length, in interleaved rounds: the fused kernels, the two other ways, and every backend of SDPA that takes the
shape. Times are medians of CUDA events, with their tenth and ninetieth percentiles. Last come other tilings of each
kernel, one at a time, at the longest length. What failed says how.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from bench import Call, inference, linear, training
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hhbench import flash_linear, linear_attention
from hhbench.attention import ATTENTIONS
from hhbench.baselines import _hedgehog_triton as kernels
from hhbench.blockwise import Size
from hhbench.kernels import kernels as what_runs
from hhbench.linear_attention import LinearAttention
from hhbench.profile.clock import Clock
from hhbench.profile.correctness import distance
from hhbench.profile.rounds import percentiles

HEADS, WIDTH = 12, 64
DEVICE = torch.device("cuda")
COLD = Clock(DEVICE, threads=1, cold=True)
BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
TILINGS = [(c, w, s) for c in (16, 32, 64) for w in (4, 8) for s in (1, 2, 3)]


def make(causal: bool, heads: int = HEADS, width: int = WIDTH, name: str = "hedgehog") -> LinearAttention:
    torch.manual_seed(0)
    module = linear(name, causal=causal, max_len=1 << 16, heads=heads, head_dim=width)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3 * width**-0.5)
    return module.to(DEVICE)


def inputs(batch: int, length: int, dtype: torch.dtype, heads: int = HEADS, width: int = WIDTH) -> list[Tensor]:
    """q, k and v [B, H, N, D], as a model's projections lay them out; values lie around 1, as rounding shows there."""
    shape = (batch, length, heads, width)
    drawn = (torch.randn(shape, device=DEVICE) + mean for mean in (0.0, 0.0, 1.0))
    return [x.to(dtype).transpose(1, 2).requires_grad_() for x in drawn]


def fused(
    module: LinearAttention, qkv: Sequence[Tensor], key_mask: Tensor | None = None, parts: int | None = None
) -> Tensor:
    a, b = module.query_map, module.key_map
    out: Tensor = kernels.hedgehog_attention(
        *qkv, a.weight, b.weight, causal=module.shape.causal, key_mask=key_mask, parts=parts
    )
    return out


def usual(
    module: LinearAttention, qkv: Sequence[Tensor], key_mask: Tensor | None = None, *, flash: bool = False
) -> Tensor:
    """What runs without the fused kernels: all chunks at once, or flash-linear-attention's kernels.

    Raises:
        RuntimeError: it wasn't what ran.
    """
    os.environ[flash_linear.ASKED] = str(int(flash))
    with what_runs() as ran:
        out: Tensor = module(*qkv, key_mask=key_mask)
    if (flash_linear.NAME in ran) != flash:
        raise RuntimeError(f"{', '.join(ran)} ran")
    return out


def errors(
    attend: Callable[..., Tensor], name: str, causal: bool, dtype: torch.dtype, length: int, width: int, masked: bool
) -> dict[str, Any]:
    """Largest error against float64, of the output and the gradients, in parts of the largest value."""
    module = make(causal, 3, width, name).eval()
    qkv = inputs(2, length, dtype, 3, width)
    mask = torch.rand(2, length, device=DEVICE) < 0.7 if masked else None
    true_module, true_qkv = (
        make(causal, 3, width, name).eval().double(),
        [x.detach().double().requires_grad_() for x in qkv],
    )
    truth = true_module(*true_qkv, key_mask=mask, form="quadratic")
    do = torch.randn_like(truth)
    expected = torch.autograd.grad(truth, [*true_qkv, *true_module.parameters()], do)
    found = attend(module, qkv, mask)
    got = torch.autograd.grad(found, [*qkv, *module.parameters()], do.to(dtype))
    names = ("output", "q", "k", "v", *(parameter for parameter, _ in module.named_parameters()))
    pairs = list(zip(names, (found, *got), (truth, *expected), strict=True))
    # A late query's gradient is small, and a difference of large numbers: its error shows in no largest value.
    late = {name: relative(x[:, :, -length // 5 :], y[:, :, -length // 5 :]) for name, x, y in pairs[:4]}
    return {"errors": {name: distance(x, y) for name, x, y in pairs}, "late": late}


def relative(found: Tensor, truth: Tensor) -> float:
    """The norm of the error in parts of the norm."""
    return float(((found.double() - truth).norm() / truth.norm()).detach())


def checked(row: dict[str, Any], dtype: torch.dtype, *arguments: Any) -> dict[str, Any]:
    """The row with its errors and whether they are small. Bounds are far above rounding and far below any mistake."""
    bound = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.01}[dtype]
    row |= {"dtype": str(dtype)} | attempt(partial(errors, *arguments))
    row["passed"] = "errors" in row and all(value < bound for value in (*row["errors"].values(), *row["late"].values()))
    print("ok  " if row["passed"] else "FAIL", json.dumps(row), flush=True)
    return row


def check_usual() -> list[dict[str, Any]]:
    """Every linear attention, its sums by all chunks at once, in blocks of three chunks, and by flash-linear-attention,
    where its keys have no log scales and its features no signs."""
    rows = []
    for name in (name for name in ATTENTIONS.names() if ATTENTIONS.get(name).rung == "FeatureMap"):
        for causal in (True, False):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                asked = causal and dtype != torch.float32 and name not in ("exp", "taylor")
                for flash in (False, True) if flash_linear.installed() and asked else (False,):
                    row: dict[str, Any] = {"attention": name, "causal": causal, "flash": flash}
                    attend = partial(usual, flash=flash)
                    with mock.patch.object(linear_attention, "LARGE", Size(384, 1 << 30)):
                        rows.append(checked(row, dtype, attend, name, causal, dtype, 1000, 64, True))
    return rows


def check_tails() -> list[dict[str, Any]]:
    """The last 64 outputs of 32,768 in bfloat16, where a sum in bfloat16 would have drifted: their largest error."""
    module = make(True).eval()
    qkv = inputs(1, 1 << 15, torch.bfloat16)
    q, k, v = (x.detach().double() for x in qkv)
    with torch.inference_mode():
        truth = make(True).eval().double()(q[:, :, -64:], k, v)
    rows = []
    for name, attend in ways(True).items():
        row: dict[str, Any] = {"ran": name} | attempt(partial(tail_error, attend, module, qkv, truth))
        row["passed"] = row.get("error_of_tail", 1.0) < 0.01
        rows.append(row)
        print("ok  " if row["passed"] else "FAIL", json.dumps(row), flush=True)
    return rows


def tail_error(attend: Callable[..., Tensor], module: LinearAttention, qkv: list[Tensor], truth: Tensor) -> Any:
    with torch.inference_mode():
        return {"error_of_tail": distance(attend(module, qkv)[:, :, -64:], truth)}


def ways(causal: bool) -> dict[str, Callable[..., Tensor]]:
    """Of computing Hedgehog's attention."""
    found: dict[str, Callable[..., Tensor]] = {"fused": fused, "chunks at once": usual}
    if causal and flash_linear.installed():
        found[flash_linear.NAME] = partial(usual, flash=True)
    return found


def check_fused() -> list[dict[str, Any]]:
    """Hedgehog's fused kernels."""
    rows = []
    for causal in (True, False):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for width in (16, 64, 128):
                if width == 128 and dtype != torch.bfloat16:
                    continue
                for length, parts, masked in ((1000, 1, False), (1000, 3, True), (2048, None, False)):
                    row: dict[str, Any] = {"causal": causal, "width": width, "length": length}
                    row |= {"parts": parts, "masked": masked}
                    attend = partial(fused, parts=parts)
                    rows.append(checked(row, dtype, attend, "hedgehog", causal, dtype, length, width, masked))
    return rows


def attempt(function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it returns, or the error in one line."""
    try:
        return function()
    except Exception as error:  # out of memory, a backend that doesn't take the shape, a kernel that doesn't launch
        torch.cuda.empty_cache()
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def first_time(call: Call, clock: Clock) -> dict[str, Any]:
    return {"seconds": clock.time(call).seconds}


def times(candidates: dict[str, Call], rounds: int, clock: Clock = COLD) -> dict[str, dict[str, Any]]:
    """Milliseconds of each, interleaved, or the error of its first call."""
    found = {name: attempt(partial(first_time, call, clock)) for name, call in candidates.items()}
    running = {name: call for name, call in candidates.items() if "error" not in found[name]}
    for name, seconds in clock.interleaved(running, rounds).items():
        found[name] = {p: 1000 * s for p, s in zip(("p10", "p50", "p90"), percentiles(seconds), strict=True)}
    return found


def candidates(module: LinearAttention, qkv: list[Tensor], backward: bool) -> dict[str, Call]:
    def call(attend: Callable[..., Tensor], weights: Sequence[Tensor] = ()) -> Call:
        return training(attend, qkv, weights) if backward else inference(attend, qkv)

    def softmax(backend: SDPBackend) -> Callable[..., Tensor]:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=module.shape.causal)

        return attend

    learned = list(module.parameters())
    found = {
        name: call(lambda *qkv, attend=attend: attend(module, qkv), learned)
        for name, attend in ways(module.shape.causal).items()
    }
    return found | {name: call(softmax(backend)) for name, backend in BACKENDS.items()}


def time_lengths(tokens: int, rounds: int, deadline: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for causal in (True, False):
        module = make(causal)
        for length in (1 << n for n in range(9, 17)):
            if length > tokens:
                continue
            if time.monotonic() > deadline:
                print(f"not timed, as --seconds are over: {length:,} tokens, causal: {causal}", flush=True)
                continue
            qkv = inputs(tokens // length, length, torch.bfloat16)
            for backward in (False, True):
                row: dict[str, Any] = {
                    "causal": causal,
                    "length": length,
                    "batch": tokens // length,
                    "backward": backward,
                }
                row["ms"] = times(candidates(module, qkv, backward), rounds)
                softmax = [t["p50"] for name, t in row["ms"].items() if name in BACKENDS and "p50" in t]
                if softmax and "p50" in row["ms"]["fused"]:
                    row["speedup over the fastest sdpa"] = min(softmax) / row["ms"]["fused"]["p50"]
                rows.append(row)
                print(json.dumps(row), flush=True)
    return rows


def time_tilings(tokens: int, rounds: int, deadline: float) -> list[dict[str, Any]]:
    """Each kernel with other tilings, the other kernels with theirs."""
    chosen = kernels.tiling_of
    rows: list[dict[str, Any]] = []
    names = ["_sums_kernel", "_forward_kernel", "_backward_queries_kernel", "_backward_keys_kernel"]
    module = make(True)
    qkv = inputs(1, tokens, torch.bfloat16)
    run = candidates(module, qkv, True)["fused"]
    for name in names:
        for c, warps, stages in TILINGS:
            if time.monotonic() > deadline:
                return rows
            kernels.tiling_of = changed_tiling(chosen, getattr(kernels, name), c, warps, stages)
            try:
                row = {"kernel": name, "tokens": c, "warps": warps, "stages": stages} | times({"fused": run}, rounds)
            finally:
                kernels.tiling_of = chosen
            rows.append(row)
            print(json.dumps(row), flush=True)
    return rows


def changed_tiling(
    chosen: Callable[..., Any], changed: Any, tokens: int, warps: int, stages: int
) -> Callable[..., Any]:
    def tiling_of(kernel: Any, P: int, block: int, half: bool) -> Any:
        if kernel is changed:
            return kernels.Tiling(tokens, block, warps, stages)
        return chosen(kernel, P, block, half)

    return tiling_of


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1 << 16, help="B x N (default: 65,536)")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=480, help="for the timings (default: 480)")
    parser.add_argument("--out", type=Path, default=Path("docs/results/gpu"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_checks needs a CUDA GPU; without one, run tests/baselines/test_hedgehog_triton.py", file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET") == "1":
        print("unset TRITON_INTERPRET: it would run the kernels on the CPU", file=sys.stderr)
        return 2
    os.environ.pop("HHBENCH_TRITON", None)  # the attention's own form is timed beside the kernels
    card = torch.cuda.get_device_name()
    record: dict[str, Any] = {
        "card": card,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
        "heads": HEADS,
        "width": WIDTH,
        "dtype": "bfloat16",
        "tokens": arguments.tokens,
        "rounds": arguments.rounds,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / (re.sub(r"[^a-z0-9]+", "-", card.lower()) + ".json")
    steps: dict[str, Callable[[], Any]] = {
        "numerics of the usual form": check_usual,
        "numerics": check_fused,
        "tails": check_tails,
        "lengths": lambda: time_lengths(arguments.tokens, arguments.rounds, time.monotonic() + 0.7 * arguments.seconds),
        "tilings": lambda: time_tilings(arguments.tokens, 5, time.monotonic() + 0.3 * arguments.seconds),
    }
    for name, step in steps.items():
        record[name] = step()
        path.write_text(json.dumps(record, indent=1) + "\n")  # what was measured stays, whatever comes next
    print(path)
    checks = [*record["numerics of the usual form"], *record["numerics"], *record["tails"]]
    return 0 if all(row["passed"] for row in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
