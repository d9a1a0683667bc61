"""How much faster than softmax is hhbench's linear attention here? The goals' table, measured again in one run.

python scripts/bench_goals.py               all rows, about ten minutes on one core
python scripts/bench_goals.py --quick       few rounds, no sequence above 4,096
python scripts/bench_goals.py --rows decode,decode-compiled
python scripts/bench_goals.py --rows profile-crossover      does a finer sweep find what `hhbench profile` states?
python scripts/bench_goals.py --publish     and put the table into docs/performance.md

Hedgehog, built by `hhbench.build_attention("hedgehog", shape)`, its feature map's time included, against torch's
scaled_dot_product_attention: batch 1, 12 heads of 64, one thread, CPU time of the thread. The last line of stdout is
one JSON document. Exits 0 whether goals are reached or not.

Rows named -compiled are the same ones with HHBENCH_NATIVE=1, the others without; a row that the compiled form doesn't
serve says so and has no value.
"""

import ctypes
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import (
    CLOCK,
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
    linear,
    parser,
    qkv,
    ratio_row,
    record,
    say,
    settings_of,
    softmax,
    training,
)
from torch import Tensor

from hhbench import native
from hhbench.attention import ATTENTIONS, Attention, FeatureMap
from hhbench.kernels import kernels
from hhbench.linear_sum import FLOOR
from hhbench.profile.correctness import distance
from hhbench.profile.crossover import estimate, in_words
from hhbench.profile.record import Crossover
from hhbench.profile.request import Request, lengths_of
from hhbench.profile.rounds import interval, percentiles

GRID = (
    128,
    160,
    192,
    224,
    256,
    288,
    320,
    352,
    384,
    416,
    448,
    512,
    640,
    768,
    1024,
    1280,
    1536,
)  # a crossover is looked for in here
ASKED = "HHBENCH_NATIVE"  # the variable that asks for the compiled form
FINER = 0.25  # octaves between the lengths around the crossover that `hhbench profile` states, and how far they reach:
AROUND = 0.75
TAIL = 256  # tokens at the end of a long sequence
SEEDS = 3


def served(ran: Collection[str]) -> bool:
    """Whether the compiled form ran, and no other, if it was asked for."""
    return not native.wanted() or bool(ran and all(name.startswith("native") for name in ran))


def unserved(name: str, what: str, ran: Collection[str], unit: str = "x") -> Row:
    note = "not served by the compiled form"
    if native.library() is None:
        note += ": no C compiler, or it failed; see the debug log of hhbench.native"
    return Row(name, what, None, unit=unit, note=note, details={"ran": sorted(ran)})


def compiled(measure: Callable[[Effort], list[Row]], effort: Effort) -> list[Row]:
    """The same rows of the compiled form, which a user must ask for."""
    os.environ[ASKED] = "1"
    try:
        rows = measure(effort)
    finally:
        del os.environ[ASKED]
    return [replace(row, name=f"{row.name}-compiled", what=f"{row.what}, compiled") for row in rows]


def times_softmax(name: str, what: str, theirs: Call, ours: Call, effort: Effort, **details: Any) -> Row:
    """SDPA's time divided by Hedgehog's."""
    with kernels() as seen:
        ours()
    if not served(seen):
        return unserved(name, what, seen)
    samples = CLOCK.interleaved({"sdpa": theirs, "hedgehog": ours}, effort.rounds)
    return ratio_row(name, what, samples, of="sdpa", to="hedgehog", **details, ran=sorted(seen))


def against_softmax(
    name: str,
    length: int,
    effort: Effort,
    *,
    backward: bool = False,
    causal: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Row:
    """One pass at one length."""
    N = effort.length(length)
    ours, theirs = passes(hedgehog(causal=causal), qkv(N, dtype=dtype), backward=backward)
    words = ["forward + backward" if backward else "forward"]
    words += [] if causal else ["bidirectional"]
    words += ["bf16"] if dtype == torch.bfloat16 else []
    return times_softmax(name, f"{', '.join(words)}, {N:,} tokens", theirs, ours, effort, length=N)


def passes(attention: Attention, inputs: Sequence[Tensor], *, backward: bool) -> tuple[Call, Call]:
    """Of an attention and of softmax, forward or forward and backward."""

    def theirs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax(q, k, v, causal=attention.shape.causal)

    if backward:
        return training(attention, inputs, list(attention.parameters())), training(theirs, inputs)
    return inference(attention, inputs), inference(theirs, inputs)


def forward(effort: Effort) -> list[Row]:
    row = against_softmax("forward", 32768, effort)
    return [row.towards(40, applies=effort.length(32768) == 32768)]


def backward(effort: Effort) -> list[Row]:
    row = against_softmax("backward", 4096, effort, backward=True)
    return [row.towards(6, applies=effort.length(4096) == 4096)]


def bf16(effort: Effort) -> list[Row]:
    row = against_softmax("bf16", 4096, effort, dtype=torch.bfloat16)
    return [row.towards(8, applies=effort.length(4096) == 4096)]


def bidirectional(effort: Effort) -> list[Row]:
    row = against_softmax("bidirectional", 4096, effort, causal=False)
    return [row.towards(8, applies=effort.length(4096) == 4096)]


def decode(effort: Effort) -> list[Row]:
    """One token: a step of the state against one query over a cache. The cache's growth is not charged to softmax."""
    rows = []
    for length in (1024, 32768):
        N = effort.length(length)
        inputs, token = qkv(N), qkv(1)
        step = stepper(hedgehog().eval(), inputs, token)
        cached = inference(lambda q, k, v: softmax(q, k, v, causal=False), (token[0], *inputs[1:]))
        what = f"decode a token, {N:,} in the cache"
        row = times_softmax(f"decode-{length}", what, cached, step, effort, length=N)
        rows.append(row.towards(110, applies=length == N) if length == 32768 else row)
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


Sweep = tuple[list[list[float]], list[str]]


def sweep(lengths: Sequence[int], effort: Effort, *, backward: bool) -> Sweep:
    """Hedgehog's time divided by SDPA's, at each length in each round, and what ran.

    Lengths and contenders all take turns in the same rounds. Nothing is timed if what ran isn't what was asked for.
    """
    attention, calls = hedgehog(), {}
    with kernels() as seen:
        for N in lengths:
            calls[f"hedgehog {N}"], calls[f"sdpa {N}"] = passes(attention, qkv(N), backward=backward)
            calls[f"hedgehog {N}"]()
    if not served(seen):
        return [], sorted(seen)
    samples = CLOCK.interleaved(calls, effort.rounds)
    return [np.divide(samples[f"hedgehog {N}"], samples[f"sdpa {N}"]).tolist() for N in lengths], sorted(seen)


def crossover_row(name: str, what: str, lengths: Sequence[int], ratios: Sequence[Sequence[float]]) -> Row:
    """Where the median over rounds crosses 1, and the spread of that over rounds drawn again. See `sweep`."""
    value, draws = estimate(lengths, ratios)
    beyond = int(np.isinf(draws).sum())
    found = np.clip(draws, lengths[0], lengths[-1])  # one that doesn't cross counts as crossing at the longest tried
    by_length = {str(N): float(1 / np.median(each)) for N, each in zip(lengths, ratios, strict=True)}
    details = {"ratios": by_length, "resamples_without": beyond}
    row = Row(name, what, None, unit="tokens", rounds=len(ratios[0]), details=details)
    if value == math.inf:
        return replace(row, note=f"softmax is still faster at {lengths[-1]:,}")
    low, _, high = percentiles(found)
    note = "" if value else f"already faster at {lengths[0]:,}, the shortest tried"
    if beyond:
        note = f"{beyond / len(draws):.0%} of the draws cross beyond {lengths[-1]:,}, and count as there"
    return replace(row, value=max(value, lengths[0]), low=low, high=high, note=note)


def crossover(effort: Effort, *, backward: bool, goal: float) -> list[Row]:
    lengths = [N for N in GRID if effort.length(N) >= N] or [effort.length(GRID[0])]
    name, words = ("backward", "forward + backward") if backward else ("forward", "forward")
    name, what = f"crossover-{name}", f"{words}, crossover length"
    ratios, ran = sweep(lengths, effort, backward=backward)
    if not ratios:
        return [unserved(name, what, ran, unit="tokens").towards(goal, at_most=True)]
    row = crossover_row(name, what, lengths, ratios)
    row = replace(row, details=row.details | {"ran": ran})
    if lengths[-1] <= goal:
        return [row.towards(goal, at_most=True, applies=False)]
    row = row.towards(goal, at_most=True)
    return [replace(row, reached=False) if row.value is None else row]


def profile_crossover(effort: Effort) -> list[Row]:
    """Does a finer sweep find the crossovers that `hhbench profile` states?"""
    from hhbench.profile.measure import profile  # imports a lot, which a process that measures memory needn't

    last = effort.length(4096)
    request = Request(
        attentions=("softmax", "hedgehog"),
        lengths=lengths_of(f"{min(128, max(1, last // 4))}:{last}"),
        modes=("prefill", "train"),
        threads=1,
        device="cpu",
    )
    return [finer(stated, effort) for stated in profile(request).crossovers]


def agrees(stated: Crossover, low: float, high: float) -> bool:
    """Whether an interval meets that of a stated crossover, which ends where that was measured."""
    above = stated.length is None and stated.speedup <= 1
    below = stated.length is None and not above
    their_low = stated.low or (stated.last if above else 0)
    their_high = stated.high or (stated.first if below else math.inf)
    return low <= their_high and high >= their_low


def finer(stated: Crossover, effort: Effort) -> Row:
    """A sweep around a stated crossover."""
    name, what = f"profile-crossover-{stated.work}", f"{stated.work}, crossover length by a finer sweep"
    centre = stated.length or (stated.last if stated.speedup <= 1 else stated.first)
    steps = np.arange(-AROUND, AROUND + FINER / 2, FINER)
    lengths = sorted({max(1, round(centre * 2**step)) for step in steps})
    ratios, ran = sweep(lengths, effort, backward=stated.work == "train")
    value, draws = estimate(lengths, ratios)
    low, high = interval(draws)
    agree = agrees(stated, low, high)
    said = in_words(value, low, high, lengths[0], lengths[-1])
    row = crossover_row(name, what, lengths, ratios)
    note = f"with 95 %: {said}; hhbench profile says {stated.said}: {'they agree' if agree else '**they differ**'}"
    details = row.details | {"ran": ran, "said": said, "profile": asdict(stated), "agree": agree}
    return replace(row, note="; ".join(filter(None, (note, row.note))), details=details)


def memory(effort: Effort) -> list[Row]:
    """Peak memory of a forward and a backward pass, each in a process of its own."""
    N, what = effort.length(8192), "forward + backward, memory beyond inputs"
    name = "memory"
    if not Path("/proc/self/clear_refs").exists():
        return [Row(name, what, None, note="needs Linux's /proc").towards(1, at_most=True, applies=False)]
    peaks: dict[str, list[float]] = {"hedgehog": [], "sdpa": []}
    ran: set[str] = set()
    for _ in range(min(effort.rounds, 3)):
        for each, found in peaks.items():
            command = [sys.executable, __file__, "--peak-of", each, "--max-length", str(N)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                note = done.stderr.strip().splitlines()[-1]
                return [Row(name, what, None, note=note).towards(1, at_most=True)]
            peak = json.loads(done.stdout)
            found.append(peak["mib"])
            ran.update(peak["ran"])
        if not served(ran):
            return [unserved(name, f"{what}, {N:,} tokens", ran).towards(1, at_most=True)]
    row = ratio_row(name, f"{what}, {N:,} tokens", peaks, of="hedgehog", to="sdpa")
    mib = {each: percentiles(found)[1] for each, found in peaks.items()}
    note = f"{mib['hedgehog']:.0f} MiB, SDPA {mib['sdpa']:.0f} MiB"
    row = replace(row, note=note, details={"mib": mib, "ran": sorted(ran)})
    return [row.towards(1, at_most=True, applies=N == 8192)]


def peak_of(name: str, N: int) -> dict[str, Any]:
    """MiB that one pass forward and back takes beyond its inputs and the gradient of its output; and what ran."""
    torch.set_num_threads(1)
    attention = hedgehog()
    attend, weights = (attention, list(attention.parameters())) if name == "hedgehog" else (softmax, [])
    training(attend, qkv(256), weights)()  # so that what is loaded once is not counted
    call = training(attend, qkv(N), weights)
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # what was freed could be taken again without showing
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    before = _status("VmRSS")
    with kernels() as seen:
        call()
    return {"mib": (_status("VmHWM") - before) / 1024, "ran": sorted(seen)}


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


Error = tuple[float, Collection[str]]
"""An error, and what ran."""


def errors(N: int, *, factor: float = 1.0) -> tuple[list[Error], Error]:
    """Of outputs, without gradients and with them, and of gradients, the worst of q, k, v and both W, against float64.

    `factor` scales the logits.
    """
    attention = hedgehog()
    q, k, v = qkv(N)
    inputs = [(q * factor**0.5).requires_grad_(), (k * factor**0.5).requires_grad_(), v.requires_grad_()]
    weights = list(attention.parameters())
    grad = torch.randn_like(v)
    with kernels() as inferred, torch.inference_mode():
        without = attention(*inputs)
    with kernels() as trained:
        out = attention(*inputs)
        found = torch.autograd.grad(out, [*inputs, *weights], grad)
    true_out, truths = exact(inputs, weights, grad)
    worst = max(distance(a, b) for a, b in zip(found, truths, strict=True))
    return [(distance(without, true_out), inferred), (distance(out, true_out), trained)], (worst, trained)


def tail_error(N: int) -> Error:
    """Of the last outputs of a long sequence in bfloat16, where a running sum in bfloat16 would have drifted."""
    attention, inputs = hedgehog().eval(), qkv(N, dtype=torch.bfloat16)
    with kernels() as seen, torch.inference_mode():
        found = attention(*inputs)[..., -TAIL:, :]
    truth, _ = exact((inputs[0][..., -TAIL:, :], *inputs[1:]), list(attention.parameters()))
    return distance(found, truth), seen


def numerics(effort: Effort) -> list[Row]:
    lengths = sorted({effort.length(N) for N in (100, 256, 1000, 2048)})
    goals_apply = lengths[-1] == 2048
    outputs: dict[int, list[Error]] = {}
    gradients: dict[int, list[Error]] = {}
    for N in lengths:
        seen = [errors(N) for _ in range(SEEDS)]
        outputs[N], gradients[N] = [each for out, _ in seen for each in out], [each for _, each in seen]
    rows = []
    for name, goal, by_length in (("outputs", 3e-7, outputs), ("gradients", 1.5e-6, gradients)):
        what = f"fp32 {name} against float64, up to {lengths[-1]:,} tokens"
        row = worst_row(f"error-{name}", what, [each for found in by_length.values() for each in found])
        worst = {str(N): max(error for error, _ in found) for N, found in by_length.items()}
        row = replace(row, details=row.details | {"worst_by_length": worst})
        rows.append(row.towards(goal, at_most=True, applies=goals_apply))
    N = effort.length(16384)
    row = worst_row("error-bf16", f"bf16, last {min(TAIL, N)} outputs of {N:,}", [tail_error(N) for _ in range(SEEDS)])
    rows.append(row.towards(3e-3, at_most=True, applies=N == 16384))
    large = [errors(lengths[-1], factor=50.0) for _ in range(SEEDS)]
    for name, found in (("outputs", [each for out, _ in large for each in out]), ("gradients", [g for _, g in large])):
        rows.append(worst_row(f"error-{name}-x50", f"fp32 {name}, logits times 50, {lengths[-1]:,} tokens", found))
    return rows


def worst_row(name: str, what: str, errors: Sequence[Error]) -> Row:
    """The worst of the errors of what was asked for."""
    values = [error for error, ran in errors if served(ran)]
    ran = sorted({kernel for _, ran in errors if served(ran) for kernel in ran})
    if not values:
        return unserved(name, what, errors[0][1], unit="error")
    row = Row(name, what, None, unit="error", rounds=len(values), details={"ran": ran})
    if not np.isfinite(values).all():
        return replace(row, reached=False, note="**NaN or infinite**")
    low, _, high = percentiles(values)
    return replace(row, value=max(values), low=low, high=high, note="the worst seen")


def others(effort: Effort) -> list[Row]:
    """Every linear attention of the registry, forward, in the same rounds."""
    N = effort.length(4096)
    names = [name for name in ATTENTIONS.names() if issubclass(ATTENTIONS.get(name).part, FeatureMap)]
    inputs = qkv(N)
    calls = {name: inference(hedgehog() if name == "hedgehog" else linear(name), inputs) for name in names}
    samples = CLOCK.interleaved({"sdpa": inference(softmax, inputs), **calls}, effort.rounds)
    return [
        ratio_row(f"forward-{name}", f"{name}, forward, {N:,} tokens", samples, of="sdpa", to=name, length=N)
        for name in names
    ]


PLAIN: Mapping[str, Callable[[Effort], list[Row]]] = {
    "forward": forward,
    "crossover-forward": partial(crossover, backward=False, goal=320),
    "backward": backward,
    "crossover-backward": partial(crossover, backward=True, goal=352),
    "bf16": bf16,
    "decode": decode,
    "bidirectional": bidirectional,
    "memory": memory,
    "numerics": numerics,
    "others": others,
    "profile-crossover": profile_crossover,
}
COMPILED = ("forward", "crossover-forward", "backward", "crossover-backward", "bf16", "decode", "memory", "numerics")
ROWS: dict[str, Callable[[Effort], list[Row]]] = {}
for each, measure in PLAIN.items():
    ROWS[each] = measure
    if each in COMPILED:
        ROWS[f"{each}-compiled"] = partial(compiled, measure)


def main() -> int:
    arguments = parser(__doc__, ROWS)
    arguments.add_argument(
        "--peak-of", choices=("hedgehog", "sdpa"), help="what --rows memory runs in a process of its own"
    )
    args = arguments.parse_args()
    effort = effort_of(args)
    if args.peak_of:
        print(json.dumps(peak_of(args.peak_of, effort.length(8192))))
        return 0
    os.environ.pop(ASKED, None)  # rows that don't say compiled aren't
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for name in chosen(args.rows, ROWS, "row"):
        say(f"{name} ...")
        for row in ROWS[name](effort):
            say(f"  {row.what}: {row.value if row.value is None else format(row.value, '.3g')} {row.note}")
            rows.append(row)
    finish(record("bench_goals", rows, **settings_of(effort)), args, "goals")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
