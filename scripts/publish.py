"""Write the tables and the plot of the README from the result files in docs/results.

python scripts/publish.py                 rewrite README.md and docs/mini.png
python scripts/publish.py runs            first copy every result below runs/ to docs/results
"""

import shutil
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from hhbench import leaderboard, result

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


def fill_readme() -> None:
    found, _ = result.find(RESULTS)
    text = (ROOT / "README.md").read_text()
    before, _, rest = text.partition(START)
    _, _, after = rest.partition(END)
    tables = leaderboard.render(leaderboard.tables(found))
    (ROOT / "README.md").write_text(f"{before}{START}\n{tables}\n{END}{after}")


def plot() -> None:
    """One panel a table: each attention's mean score, every seed a dot, the teacher a dashed line."""
    found, _ = result.find(RESULTS)
    titles = sorted({(r.task["name"], r.task["title"]) for r in found})
    figure, panels = plt.subplots(1, len(titles), figsize=(2.7 * len(titles), 3.4), squeeze=False)
    for panel, (task, title) in zip(panels[0], titles, strict=True):
        rows: dict[str, list[float]] = {}
        members = [r for r in found if (r.task["name"], r.task["title"]) == (task, title)]
        recipes = {(one.attention["label"], one.attention["recipe"]) for one in members}
        for one in members:
            label, recipe = one.attention["label"], one.attention["recipe"]
            several = len([r for name, r in recipes if name == label]) > 1
            rows.setdefault(f"{label}\n{recipe}" if several else label, []).append(one.score.value)
        labels = sorted(rows)
        means = [sum(rows[label]) / len(rows[label]) for label in labels]
        panel.bar(labels, means, color="#c9d6df", width=0.7)
        for x, label in enumerate(labels):
            panel.plot([x] * len(rows[label]), rows[label], ".", color="#1f3b4d", markersize=5)
        values = [value for scores in rows.values() for value in scores]
        teachers = {one.teacher["score"] for one in members if one.teacher}
        for score in teachers:
            panel.axhline(score, linestyle="--", color="#d1495b", linewidth=1)
        spread = max([*values, *teachers]) - min(values)
        panel.set_ylim(max(0.0, min(values) - 0.3 * spread), max([*values, *teachers]) + 0.1 * spread)
        metric = members[0].score
        arrow = "higher is better" if metric.higher_is_better else "lower is better"
        panel.set_title(f"{task}: {title}\n{metric.name.replace('_', ' ')}, {arrow}", fontsize=8)
        panel.tick_params(axis="x", rotation=40, labelsize=7)
        panel.tick_params(axis="y", labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.text(0.5, 0.005, "dots: seeds; dashed: the softmax teacher that was converted", ha="center", fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(ROOT / "docs" / "mini.png", dpi=130)


if __name__ == "__main__":
    RESULTS.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) > 1:
        collect(Path(sys.argv[1]))
    fill_readme()
    plot()
