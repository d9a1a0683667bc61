"""hhbench convert: a pretrained model with another attention, in a folder."""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hhbench.commands.settings import add_settings, settings_of
from hhbench.commands.shown import calm_libraries, print_table
from hhbench.errors import UsageError

if TYPE_CHECKING:
    from hhbench.result import Result

log = logging.getLogger("hhbench")

HELP = "give a pretrained model another attention, and keep it in a folder"
EXAMPLES = """examples:
  hhbench convert smollm2 --attn hedgehog                        a packaged model; SmolLM2 on Wikipedia
  hhbench convert smollm2 --attn hedgehog --window 64 --lora r=8,alpha=16,targets=qkvo
  hhbench convert minilm --attn hedgehog --data snli             a task's data: finetuned on its labels too
  hhbench convert dinov2 --attn hedgehog --recipe transfer-only  attention transfer and nothing after it
  hhbench convert ./my-llama --attn hedgehog --data text.txt --queries 256 --keep-layers auto:2
  hhbench convert ./my-bert --attn t2r --recipe t2r-hh --layers 0-1=softmax --to my-linear-bert
  hhbench convert bert-base-uncased --attn hedgehog --dry-run    only say what would be done"""

# What `convert` decides by itself, has its own word for, or has no use for: its teacher is there already.
LEFT_OUT = (
    "dataset", "model", "model_folder", "regime", "resume", "save_model", "teacher_epochs", "teacher_lr",
    "teacher_seed",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a name of the hub, of timm or of `hhbench list models`, or a folder")
    parser.add_argument("--data", metavar="DATA", help="a data set of a task, a text file, a table, a folder of images")
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="where the model is kept (default: converted/MODEL-ATTENTION)"
    )
    parser.set_defaults(interrupted="What is done is kept: run the same command to go on.")
    add_settings(parser, leave_out=LEFT_OUT)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and stop")


def call(args: argparse.Namespace) -> int:
    values = settings_of(args)
    if not values.get("attn"):
        raise UsageError("--attn is needed; hhbench list attentions shows them")
    from hhbench.stopping import heeding

    with heeding():  # before anything heavy is imported: a cluster's signal may come then
        return _convert(args, values)


def _convert(args: argparse.Namespace, values: dict[str, Any]) -> int:
    from hhbench import converter, ranks
    from hhbench.runner import execute, fetch, prepare

    calm_libraries()
    given = {"dataset": args.data, "model_folder": args.to, "resume": True}
    config = converter.config_of(
        args.model, values | {name: value for name, value in given.items() if value is not None}
    )
    ranks.connect(config)
    if ranks.rank() > 0:
        log.setLevel(logging.ERROR)
    plan = prepare(config)
    for line in plan.lines():
        log.info("%s", line)
    log.info("  kept in: %s", config.model_folder)
    fetch([plan])
    if args.dry_run:
        model = plan.task.build_model(plan.config, plan.task.load_data(plan.config))
        for line in plan.conversion(model).lines():
            log.info("%s", line)
        log.info("dry run: nothing done")
        return 0
    with ranks.one_line_for_lost_ranks():
        made, path = execute(config)
    if ranks.rank() == 0:
        _print_conversion(made)
        print(f"result: {path}")
        print(f"model: {config.model_folder}")
    return 0


def _print_conversion(made: "Result") -> None:
    """The score at each stage of a conversion, and how far the layers are from softmax."""
    from statistics import fmean

    def number(value: float | None) -> str:
        return "not run" if value is None else f"{value:.4g}"

    before, after = (made.fidelity["kl_before"], made.fidelity["kl_after"]) if made.fidelity else ([], [])
    trained = bool(made.cost["seconds"].get("train"))
    chosen = made.layer_choice
    kept = zip(chosen["layers"], chosen["scores"][1:], strict=True) if chosen else ()  # the first score is transfer's
    rows = [
        ("teacher", number(made.teacher["score"] if made.teacher else None), ""),
        ("after the swap", number(made.after_swap), number(fmean(before) if before else None)),
        ("after transfer", number(made.after_transfer), number(fmean(after) if after else None)),
        *((f"with layer {layer} kept", number(score), "") for layer, score in kept),
        ("after finetuning", number(made.score.value if trained else None), ""),
    ]
    print_table(("", made.score.name, "KL from softmax"), rows)
