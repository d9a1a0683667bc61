"""hhbench show: all about one name, or what differs between two results."""

import argparse
import difflib
import inspect
from pathlib import Path

from hhbench.commands.shown import literal, print_table
from hhbench.config import PRESETS, RECIPES, RunConfig
from hhbench.errors import HHBenchError, UsageError

HELP = "all about one name or one result; or what differs between two results"
EXAMPLES = """examples:
  hhbench show hedgehog                    an attention: paper, cost, options
  hhbench show glue                        a task: data sets, regimes, presets
  hhbench show 1a2b3c4d                    a result, by the start of its key
  hhbench show 1a2b3c4d 5e6f7a8b           what differs between two results' keys"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="+", help="an attention, a task, a recipe, a result's folder or the start of its key"
    )
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where results lie (default: runs)")


def call(args: argparse.Namespace) -> int:
    from hhbench import result
    from hhbench.attention import ATTENTIONS
    from hhbench.task import TASKS

    if len(args.name) > 2:
        raise UsageError("show takes one name, or two results to compare")
    if len(args.name) == 2:
        first, second = (result.find_by_prefix(args.out, name) for name in args.name)
        rows = result.diff_identity(first.identity, second.identity)
        cells = ([literal(str(cell)) for cell in row] for row in rows)
        print_table(("setting", first.key, second.key), cells) if rows else print("the same key")
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
