"""Pictures of a fidelity report. matplotlib is imported here alone: it is an optional dependency."""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from hhbench.errors import HHBenchError
from hhbench.fidelity.measures import FidelityReport, LayerReport, LengthPoint, Sample

# Told apart with any colour vision: Okabe and Ito's blue and vermilion, and grey.
STUDENT, TEACHER, MISSING = "#0072b2", "#d55e00", "#d9d9d9"
SIZES = {"font.size": 11, "axes.titlesize": 11, "axes.labelsize": 11, "figure.titlesize": 13, "savefig.dpi": 120}
COLUMNS = {"local": "local", "end_to_end": "end-to-end"}


def save_plots(
    report: FidelityReport,
    folder: Path,
    *,
    title: str,
    samples: Sequence[Sample] = (),
    lengths: Sequence[LengthPoint] = (),
) -> list[Path]:
    """Write what can be drawn of a report as PNG files, and return their paths.

        heads.png      heat maps [layers x heads] of KL, the entropy's difference and Spearman
        entropy.png    the student's entropy against the teacher's, a dot for each head
        scatter.png    weights against q.k, for a sample of queries
        lengths.png    KL and perplexity at longer sequences

    Args:
        title: names model, attention and data.

    Raises:
        HHBenchError: matplotlib isn't there, or the folder can't be written.
    """
    if find_spec("matplotlib") is None:
        raise HHBenchError("--plots needs matplotlib: pip install 'hhbench[plot]'")
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn: dict[str, Callable[[Figure], bool]] = {
        "heads.png": lambda figure: _heads(figure, report),
        "entropy.png": lambda figure: _entropy(figure, report),
        "scatter.png": lambda figure: _scatter(figure, samples),
        "lengths.png": lambda figure: _lengths(figure, lengths),
    }
    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with rc_context(SIZES):
            for name, draw in drawn.items():
                figure = Figure(layout="constrained")
                FigureCanvasAgg(figure)
                if draw(figure):
                    figure.suptitle(title)
                    figure.savefig(folder / name)
                    paths.append(folder / name)
    except OSError as error:
        raise HHBenchError(f"plots can't be written to {folder}: {error.strerror or error}") from error
    return paths


def _with_weights(report: FidelityReport) -> dict[str, list[tuple[int, LayerReport]]]:
    """By column, the layers that have weights in it, with their depths; only columns that have some."""
    found = {
        column: [(i, one) for i, one in enumerate(report.layers) if (m := getattr(one, column)) is not None and m.kl]
        for column in COLUMNS
    }
    return {column: layers for column, layers in found.items() if layers}


def _grid(report: FidelityReport, column: str, value: Callable[[Any], Sequence[float | None] | None]) -> Any:
    """A number for each head [layers, heads]; NaN where there is none."""
    measures = [getattr(layer, column) for layer in report.layers]
    rows = [[] if one is None else list(value(one) or []) for one in measures]
    width = max(map(len, rows))
    padded = [[math.nan if x is None else x for x in row] + [math.nan] * (width - len(row)) for row in rows]
    return np.array(padded, dtype=float)


def _gap(measures: Any) -> list[float] | None:
    if measures.kl is None:
        return None
    return [ours - theirs for ours, theirs in zip(measures.student_entropy, measures.teacher_entropy, strict=True)]


def _heads(figure: Any, report: FidelityReport) -> bool:
    columns = list(_with_weights(report))
    if not columns:
        return False
    panels: list[tuple[str, Callable[[Any], Any]]] = [
        ("KL(softmax ‖ weights), nats", lambda m: m.kl),
        ("entropy less that of softmax, nats", _gap),
        ("Spearman of weight and q·k", lambda m: m.spearman),
    ]
    grids = [[_grid(report, column, value) for _, value in panels] for column in columns]
    num_layers, num_heads = grids[0][0].shape
    height = min(max(2.2, 0.28 * num_layers), 8)
    figure.set_size_inches(min(max(12.0, 0.9 * num_heads), 18), len(columns) * (height + 0.7) + 0.8)
    axes = figure.subplots(len(columns), len(panels), squeeze=False)
    for index, (name, _) in enumerate(panels):
        values = np.concatenate([row[index].ravel() for row in grids])
        values = values[np.isfinite(values)]
        if not values.size:
            continue
        top = float(np.abs(values).max()) or 1.0
        low = math.floor(10 * float(values.min())) / 10
        # One scale for both comparisons: they are read against each other.
        styles = [
            {"cmap": "viridis", "vmin": 0.0, "vmax": top},
            {"cmap": "PuOr", "vmin": -top, "vmax": top},
            {"cmap": "cividis", "vmin": min(low, 0.9), "vmax": 1.0},
        ]
        for row, column in enumerate(columns):
            panel, grid = axes[row, index], np.ma.masked_invalid(grids[row][index])
            panel.set_facecolor(MISSING)
            image = panel.imshow(grid, aspect="auto", interpolation="nearest", **styles[index])
            panel.set_title(f"{name}\n{COLUMNS[column]}")
            panel.set_xticks(range(0, num_heads, max(1, num_heads // 12)))
            panel.set_yticks(range(0, num_layers, max(1, num_layers // 12)))
            panel.set_xlabel("head")
            panel.set_ylabel("layer" if index == 0 else "")
            bar = figure.colorbar(image, ax=panel)
            bar.ax.tick_params(labelsize=9)
    if any(np.isnan(grid).any() for row in grids for grid in row):
        figure.supxlabel("grey: no weights to measure", fontsize=10)
    return True


def _entropy(figure: Any, report: FidelityReport) -> bool:
    columns = _with_weights(report)
    if not columns:
        return False
    figure.set_size_inches(6.2 * len(columns) + 0.8, 5.8)
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    depth = len(report.layers)
    for panel, (column, layers) in zip(axes, columns.items(), strict=True):
        xs, ys, colours = [], [], []
        for index, layer in layers:
            measures = getattr(layer, column)
            xs += measures.teacher_entropy
            ys += measures.student_entropy
            colours += [index] * len(measures.kl)
        low, high = min(*xs, *ys), max(*xs, *ys, 0.1)
        low = 0.0 if low < high / 2 else low - (high - low) / 5
        high += (high - low) / 15
        panel.plot([low, high], [low, high], color="#555555", linestyle="--", linewidth=1)
        panel.annotate("as spiky as softmax", (low + 0.6 * (high - low), low + 0.57 * (high - low)), rotation=45,
                       rotation_mode="anchor", color="#555555", fontsize=10, va="top", ha="center")  # fmt: skip
        dots = panel.scatter(xs, ys, c=colours, cmap="viridis", vmin=0, vmax=max(1, depth - 1), s=34,
                             edgecolors="white", linewidths=0.5)  # fmt: skip
        panel.set(xlim=(low, high), ylim=(low, high), aspect="equal")
        panel.set_xlabel("entropy of softmax, nats")
        panel.set_ylabel("entropy of the attention, nats")
        panel.set_title(COLUMNS[column])
        panel.spines[["top", "right"]].set_visible(False)
    bar = figure.colorbar(dots, ax=list(axes), shrink=0.8)
    bar.set_label("layer")
    bar.set_ticks(range(0, depth, max(1, depth // 10)))
    return True


def _scatter(figure: Any, samples: Sequence[Sample]) -> bool:
    if not samples:
        return False
    from matplotlib.ticker import NullFormatter

    layers = list(dict.fromkeys(one.layer for one in samples))
    by_layer = [[one for one in samples if one.layer == layer] for layer in layers]
    width = max(map(len, by_layer))
    figure.set_size_inches(3.4 * width + 0.6, 2.9 * len(layers) + 1.0)
    axes = figure.subplots(len(layers), width, squeeze=False)
    for row, panels in zip(axes, by_layer, strict=True):
        for panel in row[len(panels) :]:
            panel.set_axis_off()
        for panel, one in zip(row, panels, strict=False):
            shown = np.isfinite(one.scores.numpy())
            x = one.scores.numpy()[shown]
            for weights, colour, name, size in (
                (one.teacher, TEACHER, "softmax", 9),
                (one.student, STUDENT, "the attention", 9),
            ):
                y = np.maximum(weights.numpy()[shown], 1e-6)
                panel.scatter(x, y, s=size, color=colour, alpha=0.45, linewidths=0, label=name, rasterized=True)
            panel.set_yscale("log")
            panel.yaxis.set_minor_formatter(NullFormatter())
            panel.set_title(f"layer {one.layer}, head {one.head}")
            panel.grid(color="#ececec")
            panel.set_axisbelow(True)
            panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("q·k, scaled as in softmax")
    figure.supylabel("weight (log scale; below 1e-6 drawn there)")
    handles, names = axes[0, 0].get_legend_handles_labels()
    legend = figure.legend(handles, names, loc="outside upper right", ncols=2, frameon=False, markerscale=2)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    return True


def _lengths(figure: Any, points: Sequence[LengthPoint]) -> bool:
    measured = [point for point in points if point.skipped is None]
    panels = [
        ("KL from softmax, local (nats)", [("the attention", "kl", STUDENT, "o-")]),
        (
            "perplexity per token",
            [("converted", "perplexity", STUDENT, "o-"), ("softmax", "teacher_perplexity", TEACHER, "s--")],
        ),
    ]
    panels = [p for p in panels if any(getattr(point, name) is not None for point in measured for _, name, *_ in p[1])]
    if not panels or len(measured) < 2:
        return False
    figure.set_size_inches(5.4 * len(panels), 4.4)
    for panel, (label, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        values = [y for p in measured for _, field, *_ in lines if (y := getattr(p, field)) is not None]
        for name, field, colour, style in lines:
            found = [(p, y) for p in measured if (y := getattr(p, field)) is not None]
            panel.plot([p.length for p, _ in found], [y for _, y in found], style, color=colour, label=name,
                       linewidth=2, markersize=7)  # fmt: skip
            for point, y in found:
                others = [other for _, column, *_ in lines if (other := getattr(point, column)) is not None]
                above = not any(0 < other - y < max(values) / 8 for other in others)  # or it would lie on that line
                panel.annotate(f"{y:.3g}", (point.length, y), textcoords="offset points", ha="center", fontsize=10,
                               xytext=(0, 9 if above else -16), color=colour)  # fmt: skip
        panel.set_xscale("log", base=2)
        panel.set_xticks([p.length for p in measured], [f"{p.length:,}\n({p.times}x)" for p in measured])
        panel.minorticks_off()
        panel.margins(x=0.12)
        panel.set_ylim(0, 1.2 * max(values) or 1)
        panel.set_xlabel("tokens (times the length that it was taught at)")
        panel.set_ylabel(label)
        panel.grid(color="#ececec")
        panel.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            panel.legend(frameon=False)
    return True
