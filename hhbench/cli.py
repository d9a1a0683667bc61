"""The commands: arguments in, one call out. Nothing heavy is imported before a command needs it."""

import argparse
import dataclasses
import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hhbench.config import PRESETS, RECIPES, RunConfig, options_of
from hhbench.errors import HHBenchError, UsageError, unknown_name

if TYPE_CHECKING:
    from hhbench.data import PackageFile
    from hhbench.result import Result
    from hhbench.task import Task

log = logging.getLogger("hhbench")

EXAMPLES = {
    None: """examples:
  python -m hhbench run --task glue --attn hedgehog      the main job: train, convert, test, tabulate
  hhbench list attentions                                what can be compared
  hhbench leaderboard                                    every result so far, as tables
  hhbench <command> --help                               a command's options, with examples""",
    "run": """examples:
  hhbench run --task glue --attn hedgehog                            all mini data sets of the task
  hhbench run --task glue,lm --attn hedgehog,t2r --seed 1            several at once
  hhbench run --task glue --dataset reviews.csv --attn hedgehog      your own data: text, (text2,) label
  hhbench run --task recall --attn my_attn.py:MyAttention            your own attention
  hhbench run --task glue --attn hedgehog --option activation=exp    an attention's option
  hhbench run --task lm --attn elu --tune lr=1e-3,3e-3               learning rates; the validation split picks
  hhbench run --task glue --attn hedgehog --devices 2 --accelerator cpu
  hhbench run --config run.yaml --seed 2                             settings from a file; flags override it
  hhbench run --config runs/.../result.json --out again              a result, run again
  hhbench run --task imagenet --attn softmax --dry-run               only say what would be done""",
    "convert": """examples:
  hhbench convert smollm2 --attn hedgehog                        a packaged model; SmolLM2 on Wikipedia
  hhbench convert smollm2 --attn hedgehog --window 64 --lora r=8,alpha=16,targets=qkvo
  hhbench convert minilm --attn hedgehog --data snli             a task's data: finetuned on its labels too
  hhbench convert dinov2 --attn hedgehog --recipe transfer-only  attention transfer and nothing after it
  hhbench convert ./my-llama --attn hedgehog --data text.txt --queries 256 --keep-layers auto:2
  hhbench convert ./my-bert --attn t2r --recipe t2r-hh --layers 0-1=softmax --to my-linear-bert
  hhbench convert bert-base-uncased --attn hedgehog --dry-run    only say what would be done""",
    "list": "examples:\n  hhbench list attentions\n  hhbench list datasets\n  hhbench list models",
    "show": """examples:
  hhbench show hedgehog                    an attention: paper, cost, options
  hhbench show glue                        a task: data sets, regimes, presets
  hhbench show 1a2b3c4d                    a result, by the start of its key
  hhbench show 1a2b3c4d 5e6f7a8b           what differs between two results' keys""",
    "leaderboard": """examples:
  hhbench leaderboard                      the tables of runs/
  hhbench leaderboard docs/results/mini --format csv > results.csv""",
    "check": """examples:
  hhbench check hedgehog                             every check, in both directions; exits 1 if one fails
  hhbench check my_attn.py:MyAttention               your own attention
  hhbench check hedgehog --option activation=exp --direction causal
  hhbench check performer --long                     also at 65,536 tokens
  hhbench check my_attn.py:MyAttention --only padding,future-value
  hhbench check taylor --json > taylor.json""",
    "fidelity": """examples:
  hhbench fidelity converted/smollm2-hedgehog                  KL, entropy, order, overlap and cosine of each layer
  hhbench fidelity converted/smollm2-hedgehog --before        the same before transfer
  hhbench fidelity converted/smollm2-hedgehog --data text.txt --heads
  hhbench fidelity runs/glue/snli/hedgehog-.../model --plots plots --json > fidelity.json
  hhbench fidelity converted/smollm2-hedgehog --lengths 1,2,4,8 --examples 32""",
    "generate": """examples:
  hhbench generate converted/smollm2-hedgehog --prompt "The hedgehog is"      greedy; decodes from a constant state
  hhbench generate converted/smollm2-hedgehog --prompt "Once" --temperature 0.8 --top-p 0.95 --seed 1
  hhbench generate converted/smollm2-hedgehog --prompt - --max-new-tokens 500 < prompt.txt
  hhbench generate runs/lm/wikipedia/hedgehog-.../model --prompt "In 1905" --num-beams 4""",
    "profile": """examples:
  hhbench profile --attn softmax,hedgehog --lengths 256:32768        one layer: training, prefill and decoding
  hhbench profile --attn all --plots plots                           every attention, within eight minutes
  hhbench profile --attn hedgehog,taylor[project_to=16] --lengths 128,197 --direction bidirectional
  hhbench profile --attn hedgehog --model smollm2 --lengths 256:1024 a whole model
  hhbench profile --attn all --task glue                             a task's training step
  hhbench profile --attn hedgehog --dtype float32,bfloat16 --threads 1 --rounds 15
  hhbench profile --attn hedgehog --against runs/profile/layer-causal-.../profile.json    exits 1 if it is slower""",
    "data": """examples:
  hhbench data list
  hhbench data fetch glue                  everything that glue needs at mini; then HHBENCH_OFFLINE=1 works
  hhbench data verify""",
    "doctor": "examples:\n  hhbench doctor",
    "new": """examples:
  hhbench new attention my-map                      a feature map: baselines/my_map.py and its test in a checkout
  hhbench new attention my-block --rung mixer       a whole block
  hhbench new task my-task --folder .               my_task.py and its test in this folder""",
}


# What `convert` decides by itself, has its own word for, or has no use for: its teacher is there already.
CONVERT_SETS = (
    "dataset", "model", "model_folder", "regime", "resume", "save_model", "teacher_epochs", "teacher_lr",
    "teacher_seed",
)  # fmt: skip


class _Parser(argparse.ArgumentParser):
    """argparse, with the nearest name for a misspelt option or command."""

    def error(self, message: str) -> NoReturn:
        known = list(self._option_string_actions)
        wrong = ""
        if message.startswith("unrecognized arguments: "):
            wrong = message.split(": ", 1)[1].split()[0].split("=")[0]
        elif "invalid choice: " in message:
            wrong = message.split("invalid choice: ", 1)[1].split("'")[1]
            known = [name for action in self._actions for name in (action.choices or ())]
        close = difflib.get_close_matches(wrong, known, n=1, cutoff=0.5) if wrong else []
        hint = f" Did you mean {close[0]!r}?" if close else ""
        self.exit(2, f"{self.prog}: {message}.{hint} See {self.prog} --help.\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            # The command's own parser knows the options that were meant.
            commands = next(a for a in self._actions if isinstance(a, argparse._SubParsersAction))
            commands.choices[parsed.command].error(f"unrecognized arguments: {' '.join(unknown)}")
        return parsed


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.DEBUG if args.debug else logging.INFO)
    try:
        code: int = args.call(args)
        return code
    except KeyboardInterrupt:
        resume = (
            f" What is done is kept: run the same command{' with --resume' * (args.command == 'run')} to go on."
            if args.command in ("run", "convert")
            else ""
        )
        print(f"\nhhbench: interrupted.{resume}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away: hhbench leaderboard | head
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115  # Python flushes stdout once more at exit
        return 1
    except Exception as error:
        if args.debug:
            raise
        if isinstance(error, HHBenchError):
            print(f"hhbench: {error}", file=sys.stderr)
            return 2 if isinstance(error, UsageError) else 1
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        print(
            f"hhbench: {type(error).__name__}: {first} (run again with --debug for the trace)",
            file=sys.stderr,
        )
        return 1


def _parser() -> _Parser:
    parser = _Parser(
        prog="hhbench",
        description="A benchmark suite for attention: train, convert and profile Hedgehog and its rivals.",
        epilog=EXAMPLES[None],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from hhbench import __version__

    parser.add_argument("--version", action="version", version=f"hhbench {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)

    def command(name: str, call: Callable[[argparse.Namespace], int], help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog=EXAMPLES[name],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(call=call)
        sub.add_argument("--debug", action="store_true", help="show the trace of an error")
        return sub

    sub = command("run", _run, "train or convert, test, and print the table row")
    _add_settings(sub)
    sub.add_argument("--dry-run", action="store_true", help="say what would be done and stop")

    sub = command("convert", _convert, "give a pretrained model another attention, and keep it in a folder")
    sub.add_argument("model", help="a name of the hub, of timm or of `hhbench list models`, or a folder")
    sub.add_argument("--data", metavar="DATA", help="a data set of a task, a text file, a table, a folder of images")
    sub.add_argument(
        "--to", type=Path, metavar="FOLDER", help="where the model is kept (default: converted/MODEL-ATTENTION)"
    )
    _add_settings(sub, leave_out=CONVERT_SETS)
    sub.add_argument("--dry-run", action="store_true", help="say what would be done and stop")

    sub = command("list", _list, "what there is")
    sub.add_argument("what", choices=("attentions", "tasks", "datasets", "models", "presets", "recipes"))

    sub = command("show", _show, "all about one name or one result; or what differs between two results")
    sub.add_argument(
        "name", nargs="+", help="an attention, a task, a recipe, a result's folder or the start of its key"
    )
    sub.add_argument("--out", type=Path, default=Path("runs"), help="where results lie (default: runs)")

    sub = command("leaderboard", _leaderboard, "every result below a folder, as tables")
    sub.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="default: runs")
    sub.add_argument("--format", default="md", help="md or csv (default: md)")

    sub = command("check", _check, "whether an attention is what it says it is: PASS, FAIL or SKIP for each check")
    sub.add_argument("name", help="a name, file.py:Class or a dotted path")
    sub.add_argument("--option", action="append", metavar="NAME=VALUE", help="of the attention (repeatable)")
    sub.add_argument("--direction", choices=("causal", "bidirectional"), help="default: every one that it serves")
    sub.add_argument("--only", metavar="CHECKS", help="these checks, by the names in the table's first column")
    sub.add_argument("--long", action="store_true", help="add the long sequences")
    sub.add_argument("--json", action="store_true", help="one JSON document in place of the table")

    sub = command("fidelity", _fidelity, "how much of softmax a converted model kept, per layer and head")
    sub.add_argument("folder", type=Path, help="a converted model, or a run that kept its model")
    sub.add_argument("--data", metavar="DATA", help="another data set of its task, or your own (default: the run's)")
    sub.add_argument("--max-len", type=int, metavar="N", help="longest sequence in tokens (default: the run's)")
    sub.add_argument("--before", action="store_true", help="the model right after the swap, before transfer")
    sub.add_argument("--examples", type=int, default=32, metavar="N", help="of the test split (default: 32)")
    sub.add_argument(
        "--lengths", default="1,2,4", metavar="TIMES", help="times the length it was taught at (default: 1,2,4)"
    )
    sub.add_argument("--top-k", type=int, default=10, metavar="K", help="keys that the overlap compares (default: 10)")
    sub.add_argument("--heads", action="store_true", help="a row for every head")
    sub.add_argument("--attn", metavar="FILE.py:CLASS", help="your own attention, which no folder names by itself")
    sub.add_argument("--json", action="store_true", help="one JSON document in place of the tables")
    sub.add_argument("--plots", type=Path, metavar="DIR", help="write plots there (needs matplotlib)")

    sub = command("profile", _profile, "time, memory and FLOPs at each length; where softmax is overtaken")
    sub.add_argument("--attn", required=True, metavar="NAMES", help="names, or name[option=value]; all: every one")
    sub.add_argument(
        "--lengths", metavar="FIRST:LAST", help="doubles up to the last, or a list (default: 256:32768; a task's own)"
    )
    sub.add_argument("--mode", metavar="MODES", help="train,prefill,decode (default: all that there is)")
    sub.add_argument("--dtype", default="float32", metavar="DTYPES", help="float32,bfloat16,float16 (default: float32)")
    group = sub.add_argument_group("what is timed (default: one attention layer)")
    group.add_argument("--task", metavar="TASK", help="this task's training step at mini")
    group.add_argument("--model", metavar="MODEL", help="a whole model: packaged, a folder, or gpt2-LAYERSxWIDTHxHEADS")
    group.add_argument("--batch-size", type=int, metavar="B", help="sequences (default: 1; a task's own)")
    group.add_argument("--heads", type=int, metavar="H", help="of a layer (default: 12)")
    group.add_argument("--head-dim", type=int, metavar="D", help="of a layer (default: 64)")
    group.add_argument("--direction", choices=("causal", "bidirectional"), help="of a layer (default: causal)")
    group = sub.add_argument_group("how")
    group.add_argument("--rounds", type=int, metavar="N", help="at most (default: 7)")
    group.add_argument("--budget", type=float, metavar="SECONDS", help="for everything (default: 480)")
    group.add_argument("--threads", type=int, metavar="N", help="of the CPU; 1 is timed by CPU time (default: torch's)")
    group.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps (default: a GPU if there is one)")
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of weights, inputs and order (default: 0)")
    group.add_argument("--dry-run", action="store_true", help="say what would be done and stop")
    group = sub.add_argument_group("what comes of it (the last line of the output is one JSON document)")
    group.add_argument("--out", type=Path, default=Path("runs"), help="folder for results (default: runs)")
    group.add_argument("--plots", type=Path, metavar="DIR", help="write plots there (needs matplotlib)")
    group.add_argument("--against", type=Path, metavar="FILE", help="an older profile; exits 1 if this one is slower")

    sub = command("generate", _generate, "text from a converted decoder, and what it keeps of the tokens")
    sub.add_argument("folder", type=Path, help="a converted model, or a run that kept its model")
    sub.add_argument("--prompt", required=True, metavar="TEXT", help="what to go on from; - reads it from stdin")
    sub.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most (default: 64)")
    sub.add_argument("--temperature", type=float, metavar="T", help="sample with it (default: the likeliest token)")
    sub.add_argument("--top-p", type=float, metavar="P", help="sample from the likeliest tokens of this probability")
    sub.add_argument("--seed", type=int, default=0, metavar="S", help="of the samples (default: 0)")
    sub.add_argument("--num-beams", type=int, default=1, metavar="K", help="beam search (default: 1, none)")
    sub.add_argument("--attn", metavar="FILE.py:CLASS", help="your own attention, which no folder names by itself")

    sub = command("data", _data, "data and weights: what is needed, what is there")
    sub.add_argument("what", choices=("list", "fetch", "verify"))
    sub.add_argument("name", nargs="*", help="files, data sets or tasks; all if left out")

    command("doctor", _doctor, "what this machine has, and what hhbench will use")

    sub = command("new", _new, "write a working attention or task with its test, to start from")
    sub.add_argument("what", choices=("attention", "task"))
    sub.add_argument("name", help="lower-case words joined by dashes; the file's name has underscores")
    sub.add_argument(
        "--rung",
        choices=("map", "attention", "mixer"),
        help="a feature map, what happens between q, k, v and the output, or a whole block (default: map)",
    )
    sub.add_argument(
        "--folder", type=Path, help="where to write (default: the checkout of hhbench that you are in, or else here)"
    )
    return parser


def _add_settings(parser: argparse.ArgumentParser, *, leave_out: Sequence[str] = ()) -> None:
    """An option for every setting of RunConfig."""
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(RunConfig):
        if field.name not in leave_out:
            name = field.metadata["group"]
            _add_setting(groups.setdefault(name, parser.add_argument_group(name)), field)
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="settings from a YAML file or a result.json; flags override it"
    )


def _add_setting(group: Any, field: "dataclasses.Field[Any]") -> None:
    flag, meta = f"--{field.name.replace('_', '-')}", field.metadata
    default = f" (default: {field.default})" if field.default not in (None, (), False) else ""
    shared: dict[str, Any] = {"default": None, "help": meta["help"] + default, "dest": field.name}
    if meta["type"] is bool:
        group.add_argument(flag, action="store_true", **shared)
    elif field.name == "option":
        group.add_argument(flag, action="append", metavar="NAME=VALUE", **shared)
    else:
        metavar = "|".join(meta["choices"]) if meta["choices"] else field.name.upper().rpartition("_")[2]
        group.add_argument(flag, metavar=metavar, **shared)


# ---- run -------------------------------------------------------------------------------------------------------


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The settings of a file, with those of the command line over them."""
    values = _yaml_settings(args.config) if args.config else {}
    for field in dataclasses.fields(RunConfig):
        given = getattr(args, field.name, None)
        if given is None or given is False:
            continue
        try:
            values[field.name] = options_of(given) if field.name == "option" else field.metadata["type"](given)
        except ValueError as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"--{field.name.replace('_', '-')} can't be {given!r}: {error}") from error
    allow_code = bool(args.allow_code)  # a file can't allow itself
    for name in ("task", "attn"):
        if values.get(name) and getattr(args, name, None) is None:
            _check_named_in_file(name, str(values[name]), allow_code=allow_code)
    return values


def _configs(args: argparse.Namespace) -> list[RunConfig]:
    """One config for each task and attention that was named, without its data sets."""
    values = _settings(args)
    for name in ("task", "attn"):
        if not values.get(name):
            raise UsageError(f"--{name} is needed; hhbench list {name.replace('attn', 'attention')}s shows them")
    tasks, attentions = str(values["task"]).split(","), str(values["attn"]).split(",")
    if attentions == ["all"]:
        from hhbench.attention import ATTENTIONS

        attentions = ATTENTIONS.names()
    return [RunConfig.from_dict(values | {"task": t.strip(), "attn": a.strip()}) for t in tasks for a in attentions]


def _yaml_settings(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} can't be read: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must hold settings, one `name: value` a line")
    fields = {field.name: field for field in dataclasses.fields(RunConfig)}
    if "schema" in values and isinstance(values.get("config"), dict):  # a result: the settings that can change it
        settings = values["config"]
        values = {
            name: settings[name] for name in settings if name in fields and fields[name].metadata["changes_result"]
        }
    known = set(fields)
    for name in values:
        if str(name).replace("-", "_") not in known:
            raise unknown_name(f"setting in {path}", str(name), known)
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _check_named_in_file(kind: str, names: str, *, allow_code: bool) -> None:
    from hhbench.attention import ATTENTIONS
    from hhbench.task import TASKS

    for name in names.split(","):
        if kind == "attn" and name == "all":
            continue
        (ATTENTIONS if kind == "attn" else TASKS).get(name.strip(), allow_code=allow_code)


def _run(args: argparse.Namespace) -> int:
    configs = _configs(args)
    from hhbench import cluster

    cluster.connect(configs[0])
    from hhbench import data
    from hhbench.runner import execute, expand, prepare
    from hhbench.train import rank

    if rank() > 0:
        log.setLevel(logging.ERROR)
    _calm_libraries()
    plans = [prepare(one) for config in configs for one in expand(config)]
    told = os.environ.get("HHBENCH_RESULT_PATH")  # set for the processes that a run on several devices starts
    for plan in plans if not told else ():
        for line in plan.lines():
            log.info("%s", line)
    if args.dry_run:
        log.info("dry run: %d run%s planned, nothing done", len(plans), "" if len(plans) == 1 else "s")
        return 0
    for plan in plans:  # what a later run lacks is said before the first one trains
        for file in plan.task.files(plan.config):
            data.fetch(file)
    results = [execute(plan.given) for plan in plans]
    if told:
        if rank() == 0:
            Path(told).write_text(str(results[0][1].resolve()))
        return 0
    if rank() == 0:
        _print_tables(results, configs[0].out)
    return 0


def _convert(args: argparse.Namespace) -> int:
    values = _settings(args)
    if not values.get("attn"):
        raise UsageError("--attn is needed; hhbench list attentions shows them")
    from hhbench import converter, data
    from hhbench.runner import execute, prepare

    _calm_libraries()
    given = {"dataset": args.data, "model_folder": args.to, "resume": True}
    config = converter.config_of(
        args.model, values | {name: value for name, value in given.items() if value is not None}
    )
    plan = prepare(config)
    for line in plan.lines():
        log.info("%s", line)
    log.info("  kept in: %s", config.model_folder)
    for file in plan.task.files(plan.config):
        data.fetch(file)
    if args.dry_run:
        model = plan.task.build_model(plan.config, plan.task.load_data(plan.config))
        for line in plan.conversion(model).lines():
            log.info("%s", line)
        log.info("dry run: nothing done")
        return 0
    made, path = execute(config)
    from hhbench.train import rank

    if rank() == 0:
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
    _print_table(("", made.score.name, "KL from softmax"), rows)


def _print_tables(made: "list[tuple[Result, Path]]", out: Path) -> None:
    from hhbench import leaderboard, result

    everything, _ = result.find(out)
    shown: list[leaderboard.Table] = []
    for one, _ in made:
        table = leaderboard.table_of(one, everything)
        if all(table.keys != other.keys for other in shown):
            shown.append(table)
    print(leaderboard.render(shown))
    for _, path in made:
        print(f"result: {path}")


def _calm_libraries() -> None:
    """Loading reports and progress bars of the libraries tell a user nothing about a run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in (
        "transformers",
        "datasets",
        "huggingface_hub",
        "timm",
        "lightning.pytorch",
        "lightning.fabric",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


# ---- list, show, leaderboard -----------------------------------------------------------------------------------


def _print_table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*headers, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def _list(args: argparse.Namespace) -> int:
    if args.what == "recipes":
        _print_table(("recipe", "what it does"), ((name, recipe.help) for name, recipe in RECIPES.items()))
    elif args.what == "models":
        from hhbench.pretrained import PRETRAINED

        _print_table(
            ("model", "MB", "licence", "holds"),
            ((name, p.file.megabytes, p.file.licence, p.file.holds) for name, p in PRETRAINED.items()),
        )
    elif args.what == "attentions":
        from hhbench.attention import ATTENTIONS

        specs = [ATTENTIONS.get(name) for name in ATTENTIONS.names()]
        _print_table(
            ("attention", "enters as", "cost per layer", "state (D 64)", "directions", "default recipe", "paper"),
            (
                (
                    s.name,
                    s.rung,
                    s.cost,
                    s.state,
                    " and ".join(sorted(s.directions)),
                    s.recipe,
                    s.paper,
                )
                for s in specs
            ),
        )
    else:
        from hhbench.task import TASKS

        tasks = [TASKS.get(name).build() for name in TASKS.names()]
        if args.what == "tasks":
            _print_table(
                ("task", "direction", "regimes (the first is the default)", "mini", "paper"),
                (
                    (
                        t.name,
                        "causal" if t.causal else "bidirectional",
                        ", ".join(t.regimes),
                        *(", ".join(t.suites.get(preset, ())) for preset in PRESETS),
                    )
                    for t in tasks
                ),
            )
        elif args.what == "datasets":
            _print_table(
                ("data set", "task", "score", "presets", "comes from"),
                (
                    (
                        name,
                        t.name,
                        f"{data.score} {'up' if data.higher_is_better else 'down'}",
                        ", ".join(p for p in PRESETS if name in t.suites.get(p, ())) or "by name",
                        ", ".join(f.name for f in data.files) or data.source,
                    )
                    for t in tasks
                    for name, data in t.datasets.items()
                ),
            )
        else:
            from hhbench.runner import prepare

            rows = []
            for task in tasks:
                for preset in PRESETS:
                    for name in task.suites.get(preset, ()):
                        plan = prepare(RunConfig(task=task.name, attn="softmax", dataset=name, preset=preset))
                        c = plan.config
                        rows.append(
                            (
                                preset,
                                task.name,
                                name,
                                c.regime,
                                c.model,
                                c.max_len,
                                c.batch_size,
                                c.epochs,
                                c.lr,
                            )
                        )
            _print_table(
                ("preset", "task", "data set", "regime", "model", "tokens", "batch", "epochs", "lr"),
                sorted(rows),
            )
    return 0


def _show(args: argparse.Namespace) -> int:
    from hhbench import result
    from hhbench.attention import ATTENTIONS
    from hhbench.task import TASKS

    if len(args.name) > 2:
        raise UsageError("show takes one name, or two results to compare")
    if len(args.name) == 2:
        first, second = (result.find_by_prefix(args.out, name) for name in args.name)
        rows = result.diff_identity(first.identity, second.identity)
        _print_table(("setting", first.key, second.key), rows) if rows else print("the same key")
        return 0
    name = args.name[0]
    if name in RECIPES and name not in ATTENTIONS.names():  # hedgehog and t2r are both
        print(f"{name}: {RECIPES[name].help}")
        return 0
    if name in TASKS.names():
        return _show_task(name)
    from hhbench.registry import is_code_reference

    if name in ATTENTIONS.names() or (is_code_reference(name) and ".py" in name):
        return _show_attention(name)
    try:
        found = result.find_by_prefix(args.out, name)
    except HHBenchError as error:
        known = [*ATTENTIONS.names(), *TASKS.names(), *RECIPES]
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UsageError(f"no attention, task or recipe named {name!r}.{hint} As a result: {error}") from error
    import json

    print(json.dumps(found.as_dict(), indent=1))
    return 0


def _show_attention(name: str) -> int:
    import inspect

    from hhbench.attention import ATTENTIONS

    spec = ATTENTIONS.get(name)
    print(f"{spec.name}: {spec.part.__name__}, a {spec.rung} ({' and '.join(sorted(spec.directions))})")
    print(f"paper: {spec.paper}\ncost per layer: {spec.cost}\nstate at head width 64: {spec.state}")
    print(f"recipe: {spec.recipe}, {RECIPES[spec.recipe].help}\n")
    print(inspect.getdoc(spec.part) or "")
    if spec.options:
        print("\noptions: " + ", ".join(f"{k}={v}" for k, v in spec.options.items()))
    return 0


def _show_task(name: str) -> int:
    import inspect

    from hhbench.runner import prepare
    from hhbench.task import TASKS

    task = TASKS.get(name).build()
    print(f"{task.title} ({'causal' if task.causal else 'bidirectional'}); regimes: {', '.join(task.regimes)}\n")
    print(inspect.getdoc(type(task)) or "")
    for preset in PRESETS:
        for name in task.suites.get(preset, ()):
            for line in prepare(RunConfig(task=task.name, attn="softmax", dataset=name, preset=preset)).lines():
                print(line)
    return 0


def _leaderboard(args: argparse.Namespace) -> int:
    from hhbench import leaderboard, result
    from hhbench.profile import record

    results, complaints = result.find(args.folder)
    profiles, damaged = record.find(args.folder)
    for complaint in (*complaints, *damaged):
        print(complaint, file=sys.stderr)
    if not results:
        raise HHBenchError(f"no results below {args.folder}; hhbench run makes them")
    print(leaderboard.render(leaderboard.tables(results, profiles), args.format), end="")
    return 0


# ---- check -----------------------------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> int:
    import time

    from rich.markup import escape

    from hhbench import check as checks
    from hhbench.attention import ATTENTIONS

    spec = ATTENTIONS.get(args.name)
    options = options_of(args.option or ())
    _calm_libraries()
    start = time.monotonic()
    with _watched(spec.name) as watch:
        findings = checks.check(
            spec,
            options=options,
            directions=[args.direction] if args.direction else None,
            long=args.long,
            only=args.only.split(",") if args.only else None,
            watch=watch,
        )
    failed = sum(f.status == "FAIL" for f in findings)
    if args.json:
        print(checks.as_json(spec, options, findings))
        return 1 if failed else 0
    styles = {"PASS": "green", "FAIL": "bold red", "SKIP": "dim"}

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2g}"

    _print_table(
        ("check", "direction", "result", "measured", "bound", "what it asserts (where it came nearest to its bound)"),
        (
            (
                f.check,
                f.direction,
                f"[{styles[f.status]}]{f.status}[/]",
                number(f.measured),
                number(f.bound),
                escape(f.title + (f" ({f.note})" if f.note else "")),
            )
            for f in findings
        ),
    )
    passed, skipped = (sum(f.status == status for f in findings) for status in ("PASS", "SKIP"))
    print(f"\n{spec.label(options)}: {passed} passed, {failed} failed, {skipped} skipped in", end=" ")
    print(f"{time.monotonic() - start:.0f} s")
    return 1 if failed else 0


# ---- fidelity --------------------------------------------------------------------------------------------------


def _fidelity(args: argparse.Namespace) -> int:
    import json

    from hhbench.fidelity.folder import Fidelity, multiples_of, open_folder

    multiples = multiples_of(args.lengths)
    if args.examples < 1:
        raise UsageError(f"--examples must be at least 1, not {args.examples}")
    _calm_libraries()
    subject = open_folder(args.folder, attn=args.attn, dataset=args.data, max_len=args.max_len)
    subject = subject.before_transfer() if args.before else subject
    with _watched("fidelity") as watch:
        found = Fidelity.of(subject, examples=args.examples, multiples=multiples, top_k=args.top_k, watch=watch)
    plots = found.save_plots(args.plots) if args.plots else []
    if args.json:
        print(json.dumps(found.as_dict(), indent=1))
        return 0
    print(found.heading())
    _print_table(*found.report.table(heads=args.heads))
    for headers, rows in found.further_tables():
        print()
        _print_table(headers, rows)
    for path in plots:
        print(f"plot: {path}")
    return 0


# ---- profile ---------------------------------------------------------------------------------------------------


def _profile(args: argparse.Namespace) -> int:
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
        _calm_libraries()
    for line in measure.plan(request):
        log.info("%s", line)
    if args.dry_run:
        log.info("dry run: nothing done")
        return 0
    with _watched("profile") as watch:
        profile = measure.profile(request, watch)
    for line in report.lines(profile):
        print(line)
    for section in report.sections(profile):
        print(f"\n{section.heading}")
        _print_table(section.headers, ([_literal(cell) for cell in row] for row in section.rows))
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


@contextmanager
def _watched(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """Shows how far a command is: a bar on a terminal, a line now and then elsewhere."""
    import time

    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from hhbench.progress import SECONDS_BETWEEN_LINES

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    due = time.monotonic() + SECONDS_BETWEEN_LINES
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def watch(done: int, total: int, what: str) -> None:
            nonlocal due
            bar.update(task, completed=done, total=total, description=escape(what))
            if not console.is_terminal and time.monotonic() >= due:
                due = time.monotonic() + SECONDS_BETWEEN_LINES
                log.info("%s: %d/%d  %s", title, done, total, what)

        yield watch


def _literal(text: str) -> str:
    """An attention's options stand in brackets, which rich would take for a style."""
    from rich.markup import escape

    return escape(text)


# ---- generate --------------------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> int:
    from hhbench.generation import Writer

    _calm_libraries()
    prompt = sys.stdin.read().removesuffix("\n") if args.prompt == "-" else args.prompt
    writer = Writer(args.folder, attn=args.attn)
    log.info("%s", writer.kept(num_beams=max(args.num_beams, 1)).line())
    written = writer.write(
        prompt,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        num_beams=args.num_beams,
        stream=True,
    )
    log.info("%s", written.line())
    return 0


# ---- data, doctor ----------------------------------------------------------------------------------------------


def _needs(names: Sequence[str]) -> "list[tuple[Task, RunConfig, tuple[PackageFile, ...]]]":
    """For every data set that is named by itself, by its task or by a file of it: its config and its pinned files."""
    from hhbench.runner import prepare
    from hhbench.task import TASKS

    found: list[tuple[Task, RunConfig, tuple[PackageFile, ...]]] = []
    known: set[str] = set()
    for task_name in TASKS.names():
        task = TASKS.get(task_name).build()
        for name in task.datasets:
            # A set that is the paper's alone is at its size; what it needs may depend on the regime.
            preset = "paper" if name in {*task.suites["paper"]} - {*task.suites["mini"]} else "mini"
            configs = [
                prepare(RunConfig(task=task_name, attn="softmax", dataset=name, preset=preset, regime=regime)).config
                for regime in task.regimes
            ]
            config, files = configs[0], tuple(dict.fromkeys(file for c in configs for file in task.files(c)))
            called = {task_name, name, *(f.name for f in files)}
            known |= called
            if not names or called & set(names):
                files = tuple(f for f in files if not names or {task_name, name, f.name} & set(names))
                found.append((task, config, files))
    for name in names:
        if name not in known:
            raise unknown_name("file, data set or task", name, known)
    return found


def _data(args: argparse.Namespace) -> int:
    from hhbench import data

    needs = _needs(args.name)
    if args.what == "fetch":
        for file in {file.name: file for _, _, files in needs for file in files}.values():
            print(f"{file.name}: {data.fetch(file)}")
        for task, config, _ in needs:
            name = str(config.dataset)
            if name in args.name and not task.dataset(name).files:  # of the hub, or generated: into others' caches
                task.build_model(config, task.load_data(config))
                print(f"{name}: ready")
        return 0
    users: dict[str, list[str]] = {}
    states: dict[str, tuple[PackageFile, str]] = {}
    for task, _, files in needs:
        for file in files:
            states[file.name] = (file, data.status(file))
            users.setdefault(file.name, [])
            users[file.name] += [task.name] if task.name not in users[file.name] else []
    _print_table(
        ("name", "status", "MB", "used by", "licence", "holds"),
        ((n, state, f.megabytes, ", ".join(users[n]), f.licence, f.holds) for n, (f, state) in states.items()),
    )
    if args.what == "verify":
        wrong = [name for name, (_, state) in states.items() if state == "corrupt"]
        if wrong:
            raise HHBenchError(f"damaged: {', '.join(wrong)}. Fetch again: hhbench data fetch {' '.join(wrong)}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    import platform
    import shutil

    import torch

    from hhbench import data, result

    versions = result.environment(device="", world_size=1, threads=torch.get_num_threads(), precision="")["versions"]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    cache = data.cache_dir()
    rows = [
        ("python", platform.python_version(), ""),
        *((name, version, "") for name, version in sorted(versions.items())),
        ("devices", ", ".join(gpus) or ("Apple MPS" if torch.backends.mps.is_available() else "CPU"), ""),
        ("cpu threads", torch.get_num_threads(), "OMP_NUM_THREADS changes it"),
        ("flash-attn", _there("flash_attn"), "softmax on CUDA in half precision; torch's SDPA otherwise"),
        ("pip", _there("pip"), "fetches pinned data; without it, put files into the cache by hand"),
        ("cache", cache, f"{shutil.disk_usage(cache).free / 1e9:.0f} GB free; HHBENCH_CACHE moves it"),
        ("network", "off (offline switch)" if data.offline() else "allowed", "HHBENCH_OFFLINE=1 forbids it"),
        ("matplotlib", _there("matplotlib"), "plots"),
        ("peft", _there("peft"), "--lora; comes with the extra `convert`"),
        ("gguf, onnx", ", ".join(map(_there, ("gguf", "onnx"))), "smollm2 and dinov2, once; the same extra"),
    ]
    _print_table(("what", "found", "note"), rows)
    return 0


def _there(package: str) -> str:
    import importlib.util

    return "installed" if importlib.util.find_spec(package) else "not installed"


# ---- new -------------------------------------------------------------------------------------------------------


def _new(args: argparse.Namespace) -> int:
    from hhbench import scaffold

    written = scaffold.new(args.what, args.name, rung=args.rung, folder=args.folder)
    for path in written.files:
        print(f"wrote {path}")
    print("next:")
    for line in written.commands:
        print(f"  {line}")
    return 0
