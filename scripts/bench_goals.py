"""How much faster than softmax is hhbench's linear attention here? The goals' table, measured again in one run.

python scripts/bench_goals.py               all rows, about ten minutes on one core
python scripts/bench_goals.py --quick       few rounds, no sequence above 4,096
python scripts/bench_goals.py --rows decode,memory
python scripts/bench_goals.py --publish     and put the table into docs/performance.md

Hedgehog, built by `hhbench.build_attention("hedgehog", shape)`, its feature map's time included, against torch's
scaled_dot_product_attention: batch 1, 12 heads of 64, one thread, CPU time of the thread. The last line of stdout is
one JSON document. Exits 0 whether goals are reached or not.
"""

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import (
    Call,
    Effort,
    H,
    Row,
    chosen,
    effort_of,
    finish,
    guarded,
    hedgehog,
    hedgehog_features,
    inference,
    interleaved,
    linear,
    parser,
    qkv,
    ratio_row,
    record,
    say,
    softmax,
    spread,
    training,
)
from torch import Tensor

from hhbench import native
from hhbench.attention import ATTENTIONS, Attention, FeatureMap
from hhbench.kernels import kernels
from hhbench.linear_attention import FLOOR

GRID = (128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448, 512, 640)  # a crossover is looked for in here
RESAMPLES = 500
TAIL = 256  # tokens at the end of a long sequence
SEEDS = 3


def against_softmax(name: str, length: int, effort: Effort, *, backward: bool = False, **how: Any) -> Row:
    """SDPA's time divided by Hedgehog's. `how`: causal, dtype."""
    causal, dtype = how.get("causal", True), how.get("dtype", torch.float32)
    N = effort.length(length)
    attention, inputs = hedgehog(causal=causal), qkv(N, dtype=dtype)
    if backward:
        ours = training(attention, inputs, list(attention.parameters()))
        theirs = training(lambda q, k, v: softmax(q, k, v, causal=causal), inputs)
    else:
        ours, theirs = inference(attention, inputs), inference(lambda q, k, v: softmax(q, k, v, causal=causal), inputs)
    with kernels() as seen:
        ours()
    words = ["forward + backward" if backward else "forward"]
    words += [] if causal else ["bidirectional"]
    words += ["bf16"] if dtype == torch.bfloat16 else []
    samples = interleaved({"sdpa": theirs, "hedgehog": ours}, effort.rounds)
    what = f"{', '.join(words)}, {N:,} tokens"
    return ratio_row(name, what, samples, of="sdpa", to="hedgehog", length=N, ran=sorted(seen))


def forward(effort: Effort) -> list[Row]:
    row = against_softmax("forward", 32768, effort)
    return [row.towards(40, applies=effort.length(32768) == 32768)]


def backward(effort: Effort) -> list[Row]:
    row = against_softmax("backward", 4096, effort, backward=True)
    return [row.towards(6, applies=effort.length(4096) == 4096)]


@contextmanager
def asked_for_compiled() -> Iterator[None]:
    before = os.environ.get("HHBENCH_NATIVE")
    os.environ["HHBENCH_NATIVE"] = "1"
    try:
        yield
    finally:
        del os.environ["HHBENCH_NATIVE"]
        if before is not None:
            os.environ["HHBENCH_NATIVE"] = before


def compiled(effort: Effort) -> list[Row]:
    """The compiled form, which a user must ask for, against the same goals."""
    if native.library() is None:
        note = "no C compiler, or it failed: see the debug log of hhbench.native"
        return [
            Row("forward-compiled", "forward, 32,768 tokens, compiled", None, note=note),
            Row("crossover-forward-compiled", "forward, crossover length, compiled", None, unit="tokens", note=note),
        ]
    with asked_for_compiled():
        rows = [*forward(effort), *crossover(effort, backward=False, goal=320)]
        attention, inputs = hedgehog().eval(), qkv(effort.length(2048))
        with torch.inference_mode():
            found = attention(*inputs)
        truth, _ = exact(inputs, list(attention.parameters()))
        error = _errors(
            "error-outputs", f"fp32 outputs against float64, {inputs[0].shape[2]:,} tokens", [distance(found, truth)]
        )
        rows.append(error.towards(3e-7, at_most=True, applies=inputs[0].shape[2] == 2048))
    return [replace(row, name=f"{row.name}-compiled", what=f"{row.what}, compiled") for row in rows]


def bf16(effort: Effort) -> list[Row]:
    row = against_softmax("bf16", 4096, effort, dtype=torch.bfloat16)
    return [row.towards(8, applies=effort.length(4096) == 4096)]


def bidirectional(effort: Effort) -> list[Row]:
    row = against_softmax("bidirectional", 4096, effort, causal=False)
    return [row.towards(8, applies=effort.length(4096) == 4096)]


def decode(effort: Effort) -> list[Row]:
    """One token: a step of the state against one query over a cache. The cache's growth is not charged to softmax."""
    rows = []
    for length, goal in ((1024, None), (32768, 110.0)):
        N = effort.length(length)
        inputs, token = qkv(N), qkv(1)
        step = stepper(hedgehog().eval(), inputs, token)
        cached = inference(lambda q, k, v: softmax(q, k, v, causal=False), (token[0], *inputs[1:]))
        with kernels() as seen:
            step()
        samples = interleaved({"sdpa": cached, "hedgehog": step}, effort.rounds)
        what = f"decode a token, {N:,} in the cache"
        row = ratio_row(f"decode-{length}", what, samples, of="sdpa", to="hedgehog", length=N, ran=sorted(seen))
        rows.append(row if goal is None else row.towards(goal, applies=length == N))
    return rows


def stepper(attention: Attention, earlier: Sequence[Tensor], token: Sequence[Tensor]) -> Call:
    """Each call takes one token more, from the state that the one before left."""
    with torch.inference_mode():
        state = attention(*earlier, return_state=True)[1]

    def step() -> None:
        nonlocal state
        with torch.inference_mode():
            _, state = attention(*token, state=state, return_state=True)

    return step


def crossing(lengths: Sequence[int], log_ratios: Sequence[float]) -> float | None:
    """The length from which the ratio stays above 1, by interpolation in the logarithms of both.

    The first length where it never is below; None where it still is at the last.
    """
    below = [i for i, value in enumerate(log_ratios) if value < 0]
    if not below:
        return float(lengths[0])
    i = below[-1]
    if i + 1 == len(lengths):
        return None
    share = -log_ratios[i] / (log_ratios[i + 1] - log_ratios[i])
    return float(lengths[i] * (lengths[i + 1] / lengths[i]) ** share)


def crossover_row(name: str, what: str, lengths: Sequence[int], log_ratios: np.ndarray) -> Row:
    """Where the median over rounds crosses 1, and the spread of that over rounds drawn again. log_ratios [round, N]."""
    rounds = len(log_ratios)
    ratios = {str(N): float(np.exp(value)) for N, value in zip(lengths, np.median(log_ratios, 0), strict=True)}
    value = crossing(lengths, np.median(log_ratios, 0).tolist())
    rng = np.random.default_rng(0)
    drawn = [
        crossing(lengths, np.median(log_ratios[rng.integers(rounds, size=rounds)], 0).tolist())
        for _ in range(RESAMPLES)
    ]
    found = [each for each in drawn if each is not None]
    details = {"ratios": ratios, "resamples_without": RESAMPLES - len(found)}
    if value is None:
        note = f"softmax is still faster at {lengths[-1]:,}"
        return Row(name, what, None, unit="tokens", rounds=rounds, note=note, details=details)
    low, _, high = spread(found)
    note = f"already faster at {lengths[0]:,}, the shortest tried" if value == lengths[0] else ""
    return Row(name, what, value, low, high, unit="tokens", rounds=rounds, note=note, details=details)


def crossover(effort: Effort, *, backward: bool, goal: float) -> list[Row]:
    """Lengths and contenders all take turns in the same rounds."""
    lengths = [N for N in GRID if effort.length(N) >= N] or [effort.length(GRID[0])]
    attention, calls = hedgehog(), {}
    for N in lengths:
        inputs = qkv(N)
        if backward:
            calls[f"hedgehog {N}"] = training(attention, inputs, list(attention.parameters()))
            calls[f"sdpa {N}"] = training(softmax, inputs)
        else:
            calls[f"hedgehog {N}"] = inference(attention, inputs)
            calls[f"sdpa {N}"] = inference(softmax, inputs)
    samples = interleaved(calls, effort.rounds)
    log_ratios = np.log([np.divide(samples[f"sdpa {N}"], samples[f"hedgehog {N}"]) for N in lengths]).T
    name, passes = ("backward", "forward + backward") if backward else ("forward", "forward")
    row = crossover_row(f"crossover-{name}", f"{passes}, crossover length", lengths, log_ratios)
    if lengths[-1] <= goal:
        return [row.towards(goal, at_most=True, applies=False)]
    row = row.towards(goal, at_most=True)
    return [replace(row, reached=False) if row.value is None else row]


def memory(effort: Effort) -> list[Row]:
    """Peak memory of a forward and a backward pass, each in a process of its own."""
    N, what = effort.length(8192), "forward + backward, memory beyond inputs"
    name = "memory"
    if not Path("/proc/self/clear_refs").exists():
        return [Row(name, what, None, note="needs Linux's /proc").towards(1, at_most=True, applies=False)]
    peaks: dict[str, list[float]] = {"hedgehog": [], "sdpa": []}
    for _ in range(min(effort.rounds, 3)):
        for each, found in peaks.items():
            command = [sys.executable, __file__, "--peak-of", each, "--max-length", str(N)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                note = done.stderr.strip().splitlines()[-1]
                return [Row(name, what, None, note=note).towards(1, at_most=True)]
            found.append(float(done.stdout))
    row = ratio_row(name, f"{what}, {N:,} tokens", peaks, of="hedgehog", to="sdpa")
    mib = {each: spread(found)[1] for each, found in peaks.items()}
    note = f"{mib['hedgehog']:.0f} MiB, SDPA {mib['sdpa']:.0f} MiB"
    row = Row(name, row.what, row.value, row.low, row.high, rounds=row.rounds, note=note, details={"mib": mib})
    return [row.towards(1, at_most=True, applies=N == 8192)]


def peak_of(name: str, N: int) -> float:
    """MiB that one pass forward and back takes beyond its inputs and the gradient of its output."""
    torch.set_num_threads(1)
    attention = hedgehog()
    attend, weights = (attention, list(attention.parameters())) if name == "hedgehog" else (softmax, [])
    training(attend, qkv(256), weights)()  # so that what is loaded once is not counted
    call = training(attend, qkv(N), weights)
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was freed could be taken again without showing
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    """KiB of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def written_out(q: Tensor, k: Tensor, v: Tensor, query_weight: Tensor, key_weight: Tensor) -> Tensor:
    """The definition for one head in the precision of its inputs; queries are the last of the keys' tokens."""
    phi_q = hedgehog_features(q, query_weight).clamp_min(FLOOR)
    phi_k = hedgehog_features(k, key_weight).clamp_min(FLOOR)
    scores = (phi_q @ phi_k.mT).tril(k.shape[-2] - q.shape[-2])
    return (scores @ v) / scores.sum(-1, keepdim=True)


def exact(
    inputs: Sequence[Tensor], weights: Sequence[Tensor], grad: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and gradients of inputs and weights if a gradient of the outputs is given, in float64, head by head."""
    outputs, gradients = [], []
    for head in range(H):
        leaves = [x[0, head].detach().double().requires_grad_() for x in inputs]
        leaves += [weight[head].detach().double().requires_grad_() for weight in weights]
        with torch.set_grad_enabled(grad is not None):
            out = written_out(*leaves)
        outputs.append(out.detach())
        if grad is not None:
            gradients.append(torch.autograd.grad(out, leaves, grad[0, head].double()))
    stacked = [torch.stack(parts) for parts in zip(*gradients, strict=True)]
    return torch.stack(outputs)[None], [g[None] if i < len(inputs) else g for i, g in enumerate(stacked)]


def distance(found: Tensor, truth: Tensor) -> float:
    """The largest error, of the largest true value."""
    return float((found.detach().double() - truth).abs().max() / truth.abs().max())


def errors(N: int, *, factor: float = 1.0) -> tuple[float, float]:
    """Of outputs and of gradients against float64, the worst of q, k, v and both W. `factor` scales the logits."""
    attention = hedgehog()
    q, k, v = qkv(N)
    inputs = [(q * factor**0.5).requires_grad_(), (k * factor**0.5).requires_grad_(), v.requires_grad_()]
    weights = list(attention.parameters())
    grad = torch.randn_like(v)
    out = attention(*inputs)
    found = torch.autograd.grad(out, [*inputs, *weights], grad)
    true_out, truths = exact(inputs, weights, grad)
    return distance(out, true_out), max(distance(a, b) for a, b in zip(found, truths, strict=True))


def tail_error(N: int) -> float:
    """Of the last outputs of a long sequence in bfloat16, where a running sum in bfloat16 would have drifted."""
    attention, inputs = hedgehog().eval(), qkv(N, dtype=torch.bfloat16)
    with torch.inference_mode():
        found = attention(*inputs)[..., -TAIL:, :]
    truth, _ = exact((inputs[0][..., -TAIL:, :], *inputs[1:]), list(attention.parameters()))
    return distance(found, truth)


def numerics(effort: Effort) -> list[Row]:
    lengths = sorted({effort.length(N) for N in (100, 256, 1000, 2048)})
    by_length = {N: [errors(N) for _ in range(SEEDS)] for N in lengths}
    seen = [each for found in by_length.values() for each in found]
    longest = f"up to {lengths[-1]:,} tokens"
    rows = [
        _errors("error-outputs", f"fp32 outputs against float64, {longest}", [a for a, _ in seen]).towards(
            3e-7, at_most=True, applies=lengths[-1] == 2048
        ),
        _errors("error-gradients", f"fp32 gradients against float64, {longest}", [b for _, b in seen]).towards(
            1.5e-6, at_most=True, applies=lengths[-1] == 2048
        ),
    ]
    for i, row in enumerate(rows):
        worst = {str(N): max(each[i] for each in found) for N, found in by_length.items()}
        rows[i] = replace(row, details={"worst_by_length": worst})
    N = effort.length(16384)
    tails = [tail_error(N) for _ in range(SEEDS)]
    row = _errors("error-bf16", f"bf16, last {min(TAIL, N)} outputs of {N:,}", tails)
    rows.append(row.towards(3e-3, at_most=True, applies=N == 16384))
    large = [errors(lengths[-1], factor=50.0) for _ in range(SEEDS)]
    for name, what, values in (
        ("error-outputs-x50", "fp32 outputs", [a for a, _ in large]),
        ("error-gradients-x50", "fp32 gradients", [b for _, b in large]),
    ):
        rows.append(_errors(name, f"{what}, logits times 50, {lengths[-1]:,} tokens", values))
    return rows


def _errors(name: str, what: str, values: Sequence[float]) -> Row:
    """The worst of some errors."""
    if not np.isfinite(values).all():
        return Row(name, what, None, unit="error", rounds=len(values), reached=False, note="**NaN or infinite**")
    low, _, high = spread(values)
    return Row(name, what, max(values), low, high, unit="error", rounds=len(values), note="the worst seen")


def others(effort: Effort) -> list[Row]:
    """Every linear attention of the registry, forward, in the same rounds."""
    N = effort.length(4096)
    names = [name for name in ATTENTIONS.names() if issubclass(ATTENTIONS.get(name).part, FeatureMap)]
    inputs = qkv(N)
    calls = {name: inference(hedgehog() if name == "hedgehog" else linear(name), inputs) for name in names}
    samples = interleaved({"sdpa": inference(softmax, inputs), **calls}, effort.rounds)
    return [
        ratio_row(f"forward-{name}", f"{name}, forward, {N:,} tokens", samples, of="sdpa", to=name, length=N)
        for name in names
    ]


ROWS: Mapping[str, Callable[[Effort], list[Row]]] = {
    "forward": forward,
    "crossover-forward": lambda effort: crossover(effort, backward=False, goal=320),
    "compiled": compiled,
    "backward": backward,
    "crossover-backward": lambda effort: crossover(effort, backward=True, goal=352),
    "bf16": bf16,
    "decode": decode,
    "bidirectional": bidirectional,
    "memory": memory,
    "numerics": numerics,
    "others": others,
}


def main() -> int:
    arguments = parser(__doc__, ROWS)
    arguments.add_argument(
        "--peak-of", choices=("hedgehog", "sdpa"), help="what --rows memory runs in a process of its own"
    )
    args = arguments.parse_args()
    effort = effort_of(args)
    if args.peak_of:
        print(peak_of(args.peak_of, effort.length(8192)))
        return 0
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name in chosen(args.rows, ROWS, "row"):
        say(f"{name} ...")
        for row in ROWS[name](effort):
            say(f"  {row.what}: {row.value if row.value is None else format(row.value, '.3g')} {row.note}")
            rows.append(row)
    finish(record("bench_goals", rows, effort), args, "goals")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
