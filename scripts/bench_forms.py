"""Up to how many tokens are all pairs at once faster than the blocks that longer sequences take? What linear attention
does by itself at each length stands beside.

python scripts/bench_forms.py                          Hedgehog and 1+ELU
python scripts/bench_forms.py --attn taylor --batch 16 --head-dim 32 --rounds 5
python scripts/bench_forms.py --publish                and put the table into docs/performance.md

A ratio is the time of all pairs at once divided by that of blocks: below 1 all pairs are faster. 12 heads, one thread,
CPU time of the thread; short calls are timed some at a time. The last line of stdout is one JSON document.
"""

import argparse
import functools
import sys
from dataclasses import replace

import torch
from bench import CLOCK, Call, D, Row, add_outputs, finish, guarded, inference, linear, ratio_row, record, say, training

from hhbench.errors import UsageError
from hhbench.kernels import kernels
from hhbench.linear_attention import LinearAttention

LENGTHS = (16, 32, 64, 80, 96, 128, 192)
ATTENTIONS = ("hedgehog", "elu")
BATCH = 4
TOKENS = 2048  # of all calls that are timed as one


def repeated(attention: LinearAttention, batch: int, num_tokens: int, form: str, *, backward: bool) -> Call:
    """Calls of one form on the same inputs."""
    shape = attention.shape
    inputs = torch.randn(3, batch, shape.num_heads, num_tokens, shape.head_dim).unbind(0)
    attend = functools.partial(attention, form=form)
    attention.train(backward)
    call = training(attend, inputs, list(attention.parameters())) if backward else inference(attend, inputs)
    times = max(1, TOKENS // (batch * num_tokens))
    return lambda: [call() for _ in range(times)]


def measure(name: str, num_tokens: int, args: argparse.Namespace, *, causal: bool, backward: bool) -> Row:
    """One ratio, and the form that "auto" takes at this length."""
    attention = linear(name, causal=causal, head_dim=args.head_dim)
    forms = ("quadratic", "chunked")
    calls = {form: repeated(attention, args.batch, num_tokens, form, backward=backward) for form in forms}
    with kernels() as ran:
        repeated(attention, args.batch, num_tokens, "auto", backward=backward)()
    samples = CLOCK.interleaved(calls, args.rounds)
    order, passes = "causal" if causal else "bidirectional", "forward + backward" if backward else "forward"
    row = ratio_row(
        f"{name} {order} {passes} {num_tokens}",
        f"{name}, {order}, {passes}, {num_tokens} tokens: all pairs / blocks",
        samples,
        of="quadratic",
        to="chunked",
        taken=sorted(ran),
    )
    return replace(row, note=f"takes {'all pairs' if 'quadratic' in ran else 'blocks'}")


def lengths(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attn", default=",".join(ATTENTIONS), help="linear attentions, separated by commas")
    parser.add_argument("--lengths", type=lengths, default=LENGTHS, metavar="A,B")
    parser.add_argument("--batch", type=int, default=BATCH, metavar="N", help=f"sequences ({BATCH})")
    parser.add_argument("--head-dim", type=int, default=D, metavar="D", help=f"of q, k and v ({D})")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="of every comparison (15)")
    add_outputs(parser)
    args = parser.parse_args()
    if min(args.rounds, args.batch, args.head_dim, *args.lengths) < 1:
        raise UsageError("--rounds, --batch, --head-dim and --lengths must be at least 1")
    names = [name.strip() for name in args.attn.split(",")]
    usual = (ATTENTIONS, LENGTHS, BATCH, D)
    if args.publish and (tuple(names), args.lengths, args.batch, args.head_dim) != usual:
        raise UsageError("--publish needs the usual attentions, lengths and shape: leave those options out")
    torch.set_num_threads(1)
    rows = []
    for name in names:
        for causal in (True, False):
            for backward in (False, True):
                for num_tokens in args.lengths:
                    rows.append(measure(name, num_tokens, args, causal=causal, backward=backward))
                    say(f"{rows[-1].what}: {rows[-1].value:.2f}")
    finish(record("bench_forms", rows, batch=args.batch, head_dim=args.head_dim), args, "forms")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
