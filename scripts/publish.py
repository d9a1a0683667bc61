"""Write the committed tables and their plot from the result files in docs/results.

python scripts/publish.py                 rewrite the tables of README.md and docs/mini.md, and docs/mini.png
python scripts/publish.py runs            first copy every result below runs/ to docs/results
"""

import math
import shutil
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from hhbench import leaderboard, result
from hhbench.attention import ATTENTIONS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
START, END = "<!-- tables: hhbench leaderboard docs/results -->\n", "<!-- end of tables -->"


def collect(runs: Path) -> None:
    """Copy results, with their scores per example, under a name that says what they are."""
    for path in sorted(runs.rglob(result.FILE_NAME)):
        one = result.load(path)
        recipe = f"-{one.attention['recipe']}" if one.attention["recipe"] else ""
        seed = one.config["seed"]
        name = f"{one.task['name']}-{one.task['title']}-{one.attention['label']}{recipe}-s{seed}"
        shutil.copyfile(path, RESULTS / f"{name}.result.json")
        shutil.copyfile(path.with_name("examples.npz"), RESULTS / f"{name}.examples.npz")


def pages() -> dict[Path, str]:
    """The tables of each page that has some: all of them, and for the front page those of averages."""
    tables = leaderboard.tables(result.find(RESULTS)[0])
    averages = [table for table in tables if table.parts]
    return {ROOT / "docs" / "mini.md": leaderboard.render(tables), ROOT / "README.md": leaderboard.render(averages)}


def fill_pages() -> None:
    for page, tables in pages().items():
        before, _, rest = page.read_text().partition(START)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{START}\n{tables}\n{END}{after}")


def plot() -> None:
    """One panel a table: a line for each attention and recipe, every seed a dot, the mean a bar, the teacher dashed."""
    found, _ = result.find(RESULTS)
    titles = sorted({(r.task["name"], r.task["title"]) for r in found})
    longest = max(
        len({(r.attention["label"], r.attention["recipe"]) for r in found if r.task["title"] == t}) for _, t in titles
    )
    columns = math.ceil(len(titles) / 2)
    figure, panels = plt.subplots(2, columns, figsize=(5.4 * columns, 2 * (1 + 0.17 * longest)), squeeze=False)
    for panel, (task, title) in zip(panels.flat, titles, strict=False):
        members = [r for r in found if (r.task["name"], r.task["title"]) == (task, title)]
        metric = members[0].score
        if metric.name.endswith("perplexity"):
            panel.set_xscale("log")
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter("{x:,.0f}")
            panel.xaxis.set_minor_locator(NullLocator())
        rows: dict[str, list[float]] = {}
        for one in members:
            label, recipe = one.attention["label"], one.attention["recipe"]
            usual = recipe in (None, ATTENTIONS.get(one.attention["name"]).recipe)
            rows.setdefault(label if usual else f"{label} ({recipe})", []).append(one.score.value)
        best_last = sorted(rows, key=lambda row: statistics.mean(rows[row]), reverse=not metric.higher_is_better)
        for y, row in enumerate(best_last):
            panel.plot(rows[row], [y] * len(rows[row]), "o", color="#1f3b4d", markersize=4, alpha=0.7)
            panel.plot([statistics.mean(rows[row])], [y], "|", color="#d17b0f", markersize=14, markeredgewidth=2)
        for score in {one.teacher["score"] for one in members if one.teacher}:
            panel.axvline(score, linestyle="--", color="#d1495b", linewidth=1)
        panel.set_yticks(range(len(best_last)), best_last, fontsize=8)
        panel.set_ylim(-0.6, len(best_last) - 0.4)
        arrow = "higher is better" if metric.higher_is_better else "lower is better"
        panel.set_title(f"{task}: {title}", fontsize=10)
        panel.set_xlabel(f"{metric.name.replace('_', ' ')}, {arrow}", fontsize=8)
        panel.tick_params(axis="x", which="both", labelsize=8)
        panel.grid(axis="y", color="#e6e6e6")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    figure.text(
        0.5,
        0.01,
        "dots: seeds; bar: their mean; dashed: the softmax teacher that was converted; in brackets: a recipe that "
        "isn't the attention's default",
        ha="center",
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(ROOT / "docs" / "mini.png", dpi=110)


if __name__ == "__main__":
    RESULTS.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]))
    fill_pages()
    plot()
