"""Write the committed tables and their plots from the result files in docs/results.

python scripts/publish.py                     rewrite the tables of README.md and docs/ and the plots beside them
                                              (docs/performance.md is bench.py's)
python scripts/publish.py mini runs           first copy every result below runs/ to docs/results/mini
python scripts/publish.py conversions runs    and here to docs/results/conversions; the same for teachers
"""

import json
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
from hhbench.profile import plots, record, report

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"
FIDELITY = ROOT / "docs" / "results" / "fidelity"  # what `hhbench fidelity --json` printed
FIDELITY_START = "<!-- table: hhbench fidelity, docs/results/fidelity -->\n"
PROFILE = ROOT / "docs" / "results" / "profile" / "layer-causal-cpu.json"  # what `hhbench profile` stored
PROFILE_START = "<!-- table: hhbench profile, docs/results/profile -->\n"
SETS = ("mini", "conversions", "teachers")  # folders of results, each with a page and a plot of its name
START, END = "<!-- tables: hhbench leaderboard docs/results/{} -->\n", "<!-- end of tables -->"


def collect(name: str, runs: Path) -> None:
    """Copy results, with their scores per example, under a name that says what they are."""
    for path in sorted(runs.rglob(result.FILE_NAME)):
        one = result.load(path)
        recipe = f"-{one.attention['recipe']}" if one.attention["recipe"] else ""
        seed = one.config["seed"]
        with_lora = "-lora" if one.config.get("lora") else ""
        teacher = f"-t{one.config['teacher_seed']}" if one.config["teacher_seed"] else ""
        title = f"{one.task['name']}-{one.task['title']}-{one.attention['label']}{recipe}{with_lora}-s{seed}{teacher}"
        shutil.copyfile(path, RESULTS / name / f"{title}.result.json")
        shutil.copyfile(path.with_name("examples.npz"), RESULTS / name / f"{title}.examples.npz")


def pages() -> dict[tuple[Path, str], str]:
    """The tables of each page that has some, by the page and its marker: all of a set's, and on the front page the
    averages of the first.
    """
    made = {}
    for name in SETS:
        found = leaderboard.tables(result.find(RESULTS / name)[0])
        made[ROOT / "docs" / f"{name}.md", START.format(name)] = leaderboard.render(found)
        if averages := [table for table in found if table.parts]:
            made[ROOT / "README.md", START.format(name)] = leaderboard.render(averages)
    return made


def fidelity_table() -> str:
    """The means over layers and heads of the reports, in both columns."""
    measures = ("kl", "teacher_entropy", "student_entropy", "spearman", "violations", "overlap", "cosine")
    lines = ["| | " + " | ".join(name.replace("_", " ") for name in measures) + " |", "|---|" + "---:|" * len(measures)]
    for column in ("local", "end_to_end"):
        for moment in ("before", "after"):
            means = json.loads((FIDELITY / f"smollm2-hedgehog-{moment}.json").read_text())["means"][column]
            cells = " | ".join(f"{means[name]:.3f}" for name in measures)
            lines.append(f"| {column.replace('_', '-')}, {moment} | {cells} |")
    return "\n".join(lines) + "\n"


def profile_table() -> str:
    """Its conditions, and what it comes down to for each attention."""
    profile = record.load(PROFILE)
    summary = report.sections(profile)[-1]
    rows = [summary.headers, ["---"] + ["---:"] * (len(summary.headers) - 1), *summary.rows]
    made = f"made on {profile.created[:10]}, at commit {str(profile.environment['commit'])[:10]}"
    said = [made, *report.lines(profile), *(f"warning: {line}" for line in profile.warnings)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return "".join(f"- {line.strip()}\n" for line in said) + f"\n{summary.heading}:\n\n{table}\n"


def tables() -> dict[tuple[Path, str], str]:
    """Everything that pages are filled with, by the page and its marker."""
    return pages() | {
        (ROOT / "docs" / "conversions.md", FIDELITY_START): fidelity_table(),
        (ROOT / "docs" / "profile.md", PROFILE_START): profile_table(),
    }


def fill_pages() -> None:
    for (page, start), text in tables().items():
        before, _, rest = page.read_text().partition(start)
        _, _, after = rest.partition(END)
        page.write_text(f"{before}{start}\n{text}\n{END}{after}")


def plot(name: str) -> None:
    """One panel a table: a line for each attention and recipe, every seed a dot, the mean a bar, the teacher dashed."""
    found, _ = result.find(RESULTS / name)
    titles = sorted({(r.task["name"], r.task["title"]) for r in found})
    longest = max(
        len({(r.attention["label"], r.attention["recipe"]) for r in found if r.task["title"] == t}) for _, t in titles
    )
    lines = 2 if len(titles) > 3 else 1
    columns = math.ceil(len(titles) / lines)
    size = (max(9.0, 5.4 * columns), lines * (1 + 0.17 * max(longest, 8)))
    figure, panels = plt.subplots(lines, columns, figsize=size, squeeze=False)
    for panel in panels.flat[len(titles) :]:
        panel.set_axis_off()
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
            notes = ([] if usual else [recipe]) + (["LoRA"] if one.config.get("lora") else [])
            rows.setdefault(f"{label} ({', '.join(notes)})" if notes else label, []).append(one.score.value)
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
        "dots: runs; bar: their mean; dashed: the softmax teachers that were converted; in brackets: a recipe that "
        "isn't the attention's default",
        ha="center",
        fontsize=8,
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    figure.savefig(ROOT / "docs" / f"{name}.png", dpi=110)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        collect(sys.argv[1], Path(sys.argv[2]))
    fill_pages()
    for each in SETS:
        plot(each)
    plots.save_plots(record.load(PROFILE), ROOT / "docs" / "profile")
