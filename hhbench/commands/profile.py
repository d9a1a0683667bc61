"""hhbench profile: what attentions cost at each length, as tables and one JSON document."""

import argparse
import logging
from pathlib import Path

from hhbench.commands.shown import calm_libraries, literal, print_table, watched
from hhbench.errors import UsageError

log = logging.getLogger("hhbench")

HELP = "time, memory and FLOPs at each length; where softmax is overtaken"
EXAMPLES = """examples:
  hhbench profile --attn softmax,hedgehog --lengths 256:32768        one layer: training, prefill and decoding
  hhbench profile --attn all --plots plots                           every attention, within eight minutes
  hhbench profile --attn hedgehog,taylor[project_to=16] --lengths 128,197 --direction bidirectional
  hhbench profile --attn hedgehog --model smollm2 --lengths 256:1024 a whole model
  hhbench profile --attn all --task glue                             a task's training step
  hhbench profile --attn hedgehog --dtype float32,bfloat16 --threads 1 --rounds 15
  hhbench profile --attn hedgehog --against runs/profile/layer-causal-.../profile.json    exits 1 if it is slower"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--attn", required=True, metavar="NAMES", help="names, or name[option=value]; all: every one")
    parser.add_argument(
        "--lengths", metavar="FIRST:LAST", help="doubles up to the last, or a list (default: 256:32768; a task's own)"
    )
    parser.add_argument("--mode", metavar="MODES", help="train,prefill,decode (default: all that there is)")
    parser.add_argument(
        "--dtype", default="float32", metavar="DTYPES", help="float32,bfloat16,float16 (default: float32)"
    )
    group = parser.add_argument_group("what is timed (default: one attention layer)")
    group.add_argument("--task", metavar="TASK", help="this task's training step at mini")
    group.add_argument("--model", metavar="MODEL", help="a whole model: packaged, a folder, or gpt2-LAYERSxWIDTHxHEADS")
    group.add_argument("--batch-size", type=int, metavar="B", help="sequences (default: 1; a task's own)")
    group.add_argument("--heads", type=int, metavar="H", help="of a layer (default: 12)")
    group.add_argument("--head-dim", type=int, metavar="D", help="of a layer (default: 64)")
    group.add_argument("--direction", choices=("causal", "bidirectional"), help="of a layer (default: causal)")
    group = parser.add_argument_group("how")
    group.add_argument("--rounds", type=int, metavar="N", help="at most (default: 7)")
    group.add_argument("--budget", type=float, metavar="SECONDS", help="for everything (default: 480)")
    group.add_argument("--threads", type=int, metavar="N", help="of the CPU; 1 is timed by CPU time (default: torch's)")
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of weights, inputs and order (default: 0)")
    group.add_argument("--dry-run", action="store_true", help="say what would be done and stop")
    group = parser.add_argument_group("what comes of it (the last line of the output is one JSON document)")
    group.add_argument("--out", type=Path, default=Path("runs"), help="folder for results (default: runs)")
    group.add_argument("--plots", type=Path, metavar="DIR", help="write plots there (needs matplotlib)")
    group.add_argument("--against", type=Path, metavar="FILE", help="an older profile; exits 1 if this one is slower")


def call(args: argparse.Namespace) -> int:
    from hhbench.profile import request as requests

    for name in ("heads", "head_dim", "direction"):
        if getattr(args, name) is not None and (args.task or args.model):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} is of a single layer; {args.task or args.model} has its own")
    given = {
        "lengths": args.lengths and requests.lengths_of(args.lengths),
        "modes": args.mode and requests.words_of(args.mode),
        "heads": args.heads,
        "head_dim": args.head_dim,
        "causal": None if args.direction is None else args.direction == "causal",
        "rounds": args.rounds,
        "seconds": args.budget,
    }

    def every() -> list[str]:
        from hhbench.attention import ATTENTIONS

        return ATTENTIONS.names()

    request = requests.Request(
        attentions=requests.labels_of(args.attn, every),
        **{"lengths": () if args.task else requests.lengths_of(requests.LENGTHS)}
        | {name: value for name, value in given.items() if value is not None},
        dtypes=requests.words_of(args.dtype),
        task=args.task,
        model=args.model,
        batch_size=args.batch_size,
        threads=args.threads,
        device=args.device,
        seed=args.seed,
    )
    from hhbench.profile import against, measure, plots, record, report

    older = record.load(args.against) if args.against else None
    if older is not None:
        against.check_settings(measure.settings_of(request), older)
    if args.plots:
        plots.need_matplotlib()
    if args.task or args.model:
        calm_libraries()
    for line in measure.plan(request):
        log.info("%s", line)
    if args.dry_run:
        log.info("dry run: nothing done")
        return 0
    with watched("profile") as watch:
        profile = measure.profile(request, watch)
    for line in report.lines(profile):
        print(line)
    for section in report.sections(profile):
        print(f"\n{section.heading}")
        print_table(section.headers, ([literal(cell) for cell in row] for row in section.rows))
    print()
    for warning in profile.warnings:
        print(f"warning: {warning}")
    comparison = None if older is None else against.compare(profile, older)
    for line in report.comparison_lines(comparison) if comparison else ():
        print(line)
    path = record.save(profile, record.place_below(args.out, profile))
    for plot in plots.save_plots(profile, args.plots) if args.plots else ():
        print(f"plot: {plot}")
    print(f"profile: {path}")
    print(profile.as_line())
    return 1 if comparison and comparison.regressions else 0
