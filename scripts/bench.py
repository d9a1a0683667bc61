"""What the bench scripts share: interleaved timing, ratios with their spread, the record of a run, and its page.

python scripts/bench.py     rewrite the tables of docs/performance.md from docs/results/performance

Times are CPU time of one thread, read by the clock of `hhbench profile`: on a machine that others use too, a wall clock
measures them as well. Contenders take turns, round by round, and a ratio is formed within a round, so that what slows
the machine down slows both.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from hhbench import result
from hhbench.attention import MixerShape, build_attention
from hhbench.errors import HHBenchError, UsageError, unknown_name
from hhbench.linear_attention import LinearAttention
from hhbench.profile.clock import Clock
from hhbench.profile.rounds import percentiles

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results" / "performance"
PAGE = ROOT / "docs" / "performance.md"
START, END = "<!-- table: docs/results/performance/{}.json -->\n", "<!-- end of table -->"
TABLES = ("goals", "forms", "peers", "training", "transfer-smollm2", "transfer-minilm")

H, D = 12, 64
CLOCK = Clock(torch.device("cpu"), threads=1)

Call = Callable[[], object]


@dataclass(frozen=True)
class Effort:
    """How long a script measures.

    Attributes:
        rounds: of every comparison; calls that take seconds get fewer.
        max_length: no sequence is longer. None: as long as the goals say.
        quick: it was asked to hurry.
    """

    rounds: int
    max_length: int | None = None
    quick: bool = False

    def length(self, wanted: int) -> int:
        return min(wanted, self.max_length or wanted)


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: what is measured, for programs: the same in every run.
        what: what is measured, for people.
        value: the median; None where it was not measured, and `note` says why.
        low: 10 % of what was seen lies below; None where there is no spread.
        high: 10 % of what was seen lies above.
        unit: "x" (a ratio), "%" (a ratio, too), "tokens", "error" (of the maximum) or "KL" (nats).
        goal: to reach; None where none was set.
        at_most: the goal is an upper bound.
        reached: None where there is no goal, or where something else than the goal's case was measured.
        rounds: that the value is the median of.
        note: what a reader must know.
        details: what the value was made from: seconds, bytes, which kernels ran.
    """

    name: str
    what: str
    value: float | None
    low: float | None = None
    high: float | None = None
    unit: str = "x"
    goal: float | None = None
    at_most: bool = False
    reached: bool | None = None
    rounds: int = 0
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def towards(self, goal: float, *, at_most: bool = False, applies: bool = True) -> "Row":
        """The row with a goal, and whether it was reached, if what was measured is the goal's case."""
        reached = None
        if applies and self.value is not None:
            reached = self.value <= goal if at_most else self.value >= goal
        note = self.note if applies else "; ".join(filter(None, (self.note, "not the goal's length")))
        return replace(self, goal=goal, at_most=at_most, reached=reached, note=note)


def say(text: str) -> None:
    """Progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def ratio_row(name: str, what: str, samples: Mapping[str, Sequence[float]], *, of: str, to: str, **details: Any) -> Row:
    """How many times as long `of` takes as `to`, in the rounds that have both."""
    ratios = [a / b for a, b in zip(samples[of], samples[to], strict=False)]
    low, value, high = percentiles(ratios)
    seconds = {each: percentiles(samples[each])[1] for each in (of, to)}
    return Row(name, what, value, low, high, rounds=len(ratios), details={"seconds": seconds, **details})


# What is timed


def hedgehog(*, causal: bool = True, max_len: int = 32768) -> LinearAttention:
    """hhbench's Hedgehog as a user builds it, with its W drawn near N(0, 1/D): a trained map is not the identity."""
    attention = linear("hedgehog", causal=causal, max_len=max_len)
    with torch.no_grad():
        for weight in attention.parameters():
            weight.normal_(std=D**-0.5)
    return attention


def linear(
    name: str, *, causal: bool = True, max_len: int = 32768, heads: int = H, head_dim: int = D
) -> LinearAttention:
    shape = MixerShape(
        dim=heads * head_dim,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        scale=head_dim**-0.5,
        max_len=max_len,
        causal=causal,
    )
    attention = build_attention(name, shape)
    if not isinstance(attention, LinearAttention):
        raise UsageError(f"{name} is no linear attention")
    return attention


def softmax(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
    """torch's own attention, the fastest softmax that it has here."""
    return scaled_dot_product_attention(q, k, v, is_causal=causal)


def qkv(num_tokens: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, H, num_tokens, D, dtype=dtype).unbind(0)
    return q, k, v


def inference(attend: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Call:
    """A forward pass as inference runs it."""
    if isinstance(attend, nn.Module):
        attend.eval()

    def call() -> Tensor:
        with torch.inference_mode():
            return attend(*inputs)

    return call


def training(attend: Callable[..., Tensor], inputs: Sequence[Tensor], weights: Sequence[Tensor] = ()) -> Call:
    """A forward and a backward pass, to q, k, v and the weights."""
    if isinstance(attend, nn.Module):
        attend.train()
    inputs = [x.detach().requires_grad_() for x in inputs]
    grad = torch.randn_like(inputs[2])

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attend(*inputs), [*inputs, *weights], grad)

    return call


def hedgehog_features(x: Tensor, weight: Tensor) -> Tensor:
    """Hedgehog's map written out: [softmax(x W), softmax(-x W)]."""
    y = x @ weight
    return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1)


# Records


def machine() -> str:
    """The CPU by name, family and model, and what torch makes of it: names of virtual machines say little."""
    found: dict[str, str] = {}
    if (info := Path("/proc/cpuinfo")).exists():
        for line in info.read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    family = (
        f"family {found['cpu family']}, model {found['model']}, " if {"cpu family", "model"} <= found.keys() else ""
    )
    amx = " with AMX" if "amx_tile" in found.get("flags", "") else ""
    return f"{result.cpu_name()} ({family}{torch.backends.cpu.get_cpu_capability()}{amx})"


def record(script: str, rows: Sequence[Row], *, quick: bool = False, **more: Any) -> dict[str, Any]:
    """What a run leaves behind, as plain JSON values."""
    threads = torch.get_num_threads()
    environment = result.environment(device=machine(), world_size=1, threads=threads, precision="float32")
    return {
        "script": f"scripts/{script}.py",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "cores": os.cpu_count(),
        "environment": environment,
        **more,
        "rows": [asdict(row) for row in rows],
    }


# Tables


def shown(value: float, unit: str) -> str:
    if unit == "error":
        return f"{value:.1e}"
    if unit == "tokens":
        return f"{value:,.0f}"
    if unit == "%":
        return f"{value:.1%}"
    if unit == "KL":
        return f"{value:.4f}"
    return f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def table(found: Mapping[str, Any]) -> str:
    """The rows of a record in Markdown, under a line that says when and where."""
    environment = found["environment"]
    commit = (environment["commit"] or "unknown")[:10] + (" and changes" if environment["dirty"] else "")
    quick = "A quick run: few rounds, and short sequences only. " if found["quick"] else ""
    return (
        f"{quick}{found['created'][:10]}, {environment['device']}, {environment['threads']} of {found['cores']} cores, "
        f"torch {environment['versions']['torch']}, Python {environment['python']}, commit {commit}.\n\n"
        + _rows_table([Row(**values) for values in found["rows"]])
    )


def _rows_table(rows: Iterable[Row]) -> str:
    lines = ["| what | measured | p10 .. p90 | goal | reached | |", "|---|---:|---:|---:|---|---|"]
    for row in rows:
        value = low_high = goal = ""
        if row.value is not None:
            value = shown(row.value, row.unit)
        if row.low is not None and row.high is not None:
            low_high = f"{shown(row.low, row.unit)} .. {shown(row.high, row.unit)}"
        if row.goal is not None:
            goal = f"{'<=' if row.at_most else '>='} {shown(row.goal, row.unit)}"
        reached = {True: "yes", False: "**no**", None: ""}[row.reached]
        lines.append(f"| {row.what} | {value or 'not measured'} | {low_high} | {goal} | {reached} | {row.note} |")
    return "\n".join(lines) + "\n"


def blocks() -> dict[str, str]:
    """What stands under each marker of the page: the table of its result file."""
    made = {}
    for name in TABLES:
        path = RESULTS / f"{name}.json"
        made[START.format(name)] = table(json.loads(path.read_text())) if path.exists() else "Not run yet.\n"
    return made


def fill_page() -> None:
    page = PAGE.read_text()
    for start, text in blocks().items():
        before, _, rest = page.partition(start)
        page = f"{before}{start}\n{text}\n{END}{rest.partition(END)[2]}"
    PAGE.write_text(page)


# The command line


def parser(description: str | None, rows: Iterable[str]) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="few rounds and no sequence above 4,096: a minute or two")
    made.add_argument("--rounds", type=int, metavar="N", help="of every comparison (15; 5 with --quick)")
    made.add_argument("--max-length", type=int, metavar="N", help="no longer sequence; the goals then don't apply")
    made.add_argument("--rows", metavar="A,B", help=f"only these of {', '.join(rows)}")
    add_outputs(made)
    return made


def add_outputs(made: argparse.ArgumentParser) -> None:
    made.add_argument("--json", type=Path, metavar="FILE", help="write the result file here as well")
    made.add_argument("--publish", action="store_true", help="put the result into docs/results and docs/performance.md")


def effort_of(args: argparse.Namespace) -> Effort:
    if any(number is not None and number < 1 for number in (args.rounds, args.max_length)):
        raise UsageError("--rounds and --max-length must be at least 1")
    if args.publish and args.rows:
        raise UsageError("--publish needs a run of all rows: leave --rows out")
    return Effort(
        rounds=args.rounds or (5 if args.quick else 15),
        max_length=args.max_length or (4096 if args.quick else None),
        quick=args.quick,
    )


def chosen(wanted: str | None, known: Iterable[str], kind: str) -> list[str]:
    """The names of a comma-separated list, or all."""
    names = list(known)
    if wanted is None:
        return names
    picked = [name.strip() for name in wanted.split(",")]
    for name in picked:
        if name not in names:
            raise unknown_name(kind, name, names)
    return picked


def settings_of(effort: Effort) -> dict[str, Any]:
    """What `record` is to say of how an attention was measured."""
    shape = {"batch": 1, "heads": H, "head_dim": D}
    return {"quick": effort.quick, "max_length": effort.max_length, "shape": shape}


def finish(found: dict[str, Any], args: argparse.Namespace, name: str) -> None:
    """The table for people, the files that were asked for, and the record as the last line."""
    text = json.dumps(found, indent=1, allow_nan=False) + "\n"
    print(table(found))
    if args.json:
        args.json.write_text(text)
    if args.publish:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{name}.json").write_text(text)
        fill_page()
    print(json.dumps(found, allow_nan=False))


def guarded(main: Callable[[], int]) -> int:
    """The exit status. What went wrong is one line that says what to do, and 2 if the request itself was wrong."""
    try:
        return main()
    except HHBenchError as error:
        say(f"error: {error}")
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    fill_page()
