"""hhbench list: the names of what there is."""

import argparse

from hhbench.commands.shown import print_table
from hhbench.config import PRESETS, RECIPES, RunConfig

HELP = "what there is"
EXAMPLES = "examples:\n  hhbench list attentions\n  hhbench list datasets\n  hhbench list models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("attentions", "tasks", "datasets", "models", "presets", "recipes"))


def call(args: argparse.Namespace) -> int:
    if args.what == "recipes":
        print_table(("recipe", "what it does"), ((name, recipe.help) for name, recipe in RECIPES.items()))
    elif args.what == "models":
        from hhbench.pretrained import PRETRAINED

        print_table(
            ("model", "MB", "licence", "holds"),
            ((name, p.file.megabytes, p.file.licence, p.file.holds) for name, p in PRETRAINED.items()),
        )
    elif args.what == "attentions":
        from hhbench.attention import ATTENTIONS

        specs = [ATTENTIONS.get(name) for name in ATTENTIONS.names()]
        print_table(
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
            print_table(
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
            print_table(
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
            print_table(
                ("preset", "task", "data set", "regime", "model", "tokens", "batch", "epochs", "lr"),
                sorted(rows),
            )
    return 0
