"""What a step of attention transfer costs, as a multiple of the teacher's own forward pass, and what it teaches.

python scripts/bench_transfer.py                            the first layer of SmolLM2
python scripts/bench_transfer.py --model minilm --lengths 128,256,512
python scripts/bench_transfer.py --model gpt2               as wide as GPT-2, random weights and no KL
python scripts/bench_transfer.py --publish                  and put the table into docs/performance.md

A step is the teacher-forced forward pass with the losses back-propagated inside, and AdamW's update of the maps, on the
whole loss and on a sample of the queries. The teacher's pass is the same model's without a graph, by torch's fused
softmax, on the same tokens. Both leave the model's head out. They take turns on one thread, and are timed in its CPU
seconds; memory is what torch's allocator handed out at most. Then the maps are taught on the same sequences at the
longest length: as many steps on a sample as on the whole loss, and as many as take its time. The KL is the mean over
layers and heads on a sequence that was not taught. The last line is one JSON document.
"""

import argparse
import copy
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from bench import CLOCK, Row, add_outputs, finish, guarded, ratio_row, record, say
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPT2Model

from hhbench import hosts, pretrained
from hhbench.distill import TransferLoss, intercepted
from hhbench.errors import UsageError, unknown_name
from hhbench.fidelity import measure
from hhbench.profile.clock import inspect
from hhbench.tasks.lm import load_texts
from hhbench.train import encode

MODELS = ("gpt2", "minilm", "smollm2")
LEARNING_RATE = 1e-2  # of the tasks' transfer stages
GOALS = {128: 2.0, 256: 2.0, 512: 2.0, 4096: 5.0}  # of the whole loss, by length
SAMPLED_GOALS = {4096: 2.0}


def config_of(model: nn.Module) -> Any:
    return model.config


def build(name: str, layers: int, length: int) -> nn.Module:
    """The first layers of a model, without its head. GPT-2 has random weights: its width is what is measured."""
    if name not in MODELS:
        raise unknown_name("model", name, MODELS)
    torch.manual_seed(0)
    if name == "gpt2":
        config = GPT2Config(n_layer=layers, n_positions=length, vocab_size=1000, bos_token_id=None, eos_token_id=None)
        model: nn.Module = GPT2Model(config)
    else:
        model = AutoModel.from_pretrained(pretrained.source(name), num_hidden_layers=layers, dtype=torch.float32)
        longest = config_of(model).max_position_embeddings
        if length > longest:
            raise UsageError(f"{name} takes {longest:,} tokens: leave longer lengths out of --lengths")
    return model.eval()


@dataclass
class Transfer:
    """A converted model, its losses and its optimiser."""

    model: nn.Module
    queries: int

    def __post_init__(self) -> None:
        draws = torch.Generator().manual_seed(0)
        self.losses = {name: TransferLoss(queries=self.queries, generator=draws) for name in hosts.slots(self.model)}
        self.optimizer = torch.optim.AdamW(
            hosts.attention_parameters(self.model), lr=LEARNING_RATE, weight_decay=0.0, fused=True
        )

    def step(self, ids: Tensor) -> float:
        """The loss, the mean over layers and queries."""
        self.optimizer.zero_grad()
        for loss in self.losses.values():
            loss.weight = 1 / (len(self.losses) * ids.numel())
        with torch.no_grad(), intercepted(self.model, dict(self.losses)):
            encode(self.model, {"input_ids": ids})
        self.optimizer.step()
        return statistics.fmean(float(loss.total) for loss in self.losses.values()) / ids.numel()


def forward(model: nn.Module, ids: Tensor) -> None:
    with torch.no_grad():
        encode(model, {"input_ids": ids})


def tokens(name: str, model: nn.Module) -> Tensor:
    """One long row of tokens: Wikipedia's for a pretrained model, and random ones for random weights."""
    if name == "gpt2":
        return torch.randint(config_of(model).vocab_size, (2**15,))
    tokenizer = AutoTokenizer.from_pretrained(pretrained.source(name))
    found: Tensor = tokenizer(
        load_texts("wikipedia", None).train[:200_000], return_tensors="pt", add_special_tokens=False
    ).input_ids
    return found[0]


def cost(args: argparse.Namespace, teacher: nn.Module, student: nn.Module, length: int, stream: Tensor) -> list[Row]:
    """The ratios at one length."""
    ids = torch.stack(list(torch.split(stream, length)[: max(1, args.tokens // length)]))
    whole, sampled = (Transfer(copy.deepcopy(student), queries) for queries in (0, args.queries))
    calls: dict[str, Callable[[], object]] = {
        "teacher": lambda: forward(teacher, ids),
        "whole": lambda: whole.step(ids),
        "sampled": lambda: sampled.step(ids),
    }
    samples = CLOCK.interleaved(calls, args.rounds)
    peaks = {name: inspect(call, CLOCK.device).peak_bytes or 0 for name, call in calls.items()}
    rows = []
    for name, what, goals in (
        ("whole", "every query", GOALS),
        ("sampled", f"{args.queries} queries of a sequence", SAMPLED_GOALS),
    ):
        row = ratio_row(
            f"{name} {length}",
            f"{len(ids)} x {length:,} tokens: step on {what} / teacher's forward pass",
            samples,
            of=name,
            to="teacher",
            peak_bytes={"step": peaks[name], "teacher": peaks["teacher"]},
        )
        row = replace(row, note=f"memory {peaks[name] / peaks['teacher']:.2f}x")
        rows.append(row.towards(goals[length], at_most=True) if length in goals else row)
    return rows


def quality(args: argparse.Namespace, student: nn.Module, rows: list[Row], stream: Tensor) -> list[Row]:
    """KL before and after, at the longest length."""
    length = max(args.lengths)
    first, *batches = (piece[None] for piece in torch.split(stream, length)[:5])
    held_out = [{"input_ids": first}]
    ratios = {row.name: row.value or math.nan for row in rows}
    longer = round(args.steps * ratios[f"whole {length}"] / ratios[f"sampled {length}"])

    def kl(model: nn.Module) -> float:
        layers = [layer.local for layer in measure(model, held_out, order=False).layers]
        return statistics.fmean(kl for local in layers if local for kl in local.kl or () if kl is not None)

    found = [Row("kl before", f"KL before, {length:,} tokens", kl(student), unit="KL")]
    for name, queries, steps in (
        ("whole", 0, args.steps),
        ("sampled, same steps", args.queries, args.steps),
        ("sampled, same time", args.queries, longer),
    ):
        transfer = Transfer(copy.deepcopy(student), queries)
        for i in range(steps):
            transfer.step(batches[i % len(batches)])
        found.append(Row(f"kl {name}", f"KL, {name}: {steps} steps", kl(transfer.model), unit="KL"))
        say(f"{found[-1].what}: {found[-1].value:.4f}")
    return found


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="smollm2", help=f"{', '.join(MODELS)} (smollm2)")
    made.add_argument("--layers", type=positive, default=1, metavar="N", help="of the model's, the first (1)")
    made.add_argument("--attn", default="hedgehog", help="what is taught (hedgehog)")
    made.add_argument(
        "--lengths",
        type=lambda text: [positive(part) for part in text.split(",")],
        default=[128, 256, 512, 1024, 2048, 4096],
        metavar="A,B",
    )
    made.add_argument("--tokens", type=positive, default=1024, metavar="N", help="of a batch of short sequences (1024)")
    made.add_argument("--queries", type=positive, default=256, metavar="N", help="of the sampled loss (256)")
    made.add_argument("--rounds", type=positive, default=5, metavar="N", help="of every comparison (5)")
    made.add_argument("--steps", type=int, default=12, metavar="N", help="taught on the whole loss; 0 = no KL (12)")
    add_outputs(made)
    args = made.parse_args()
    if args.publish and (args.model == "gpt2" or (args.attn, args.layers, args.steps) != ("hedgehog", 1, 12)):
        raise UsageError("--publish needs Hedgehog in the first layer of smollm2 or minilm, and its KL")
    torch.set_num_threads(1)
    teacher = build(args.model, args.layers, max(args.lengths))
    stream = tokens(args.model, teacher)
    student = hosts.convert(copy.deepcopy(teacher), args.attn).eval()
    rows: list[Row] = []
    for length in args.lengths:
        rows += cost(args, teacher, student, length, stream)
        for row in rows[-2:]:
            say(f"{row.what}: {row.value:.2f}x ({row.low:.2f} .. {row.high:.2f}), {row.note}")
    if args.steps and args.model != "gpt2":  # random weights have nothing to teach
        rows += quality(args, student, rows, stream)
    about = {"model": args.model, "layers": args.layers, "attention": args.attn, "seeds": 1}
    finish(record("bench_transfer", rows, **about), args, f"transfer-{args.model}")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
