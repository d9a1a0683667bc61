"""Pictures of a profile. matplotlib is imported here alone: it is an optional dependency."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

from hhbench.errors import HHBenchError
from hhbench.profile.record import Cell, Profile
from hhbench.profile.report import speedup
from hhbench.profile.subjects import is_softmax

SIZES = {"font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10, "figure.titlesize": 12, "savefig.dpi": 120}
# Okabe and Ito's, told apart with any colour vision. Softmax alone is black.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6000")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
BLACK = "#000000"
GAP = 0.046  # between two labels, as a part of the panel's height
WORDS = {"train": "training step", "prefill": "prefill", "first token": "first token", "token": "one token"}


def save_plots(profile: Profile, folder: Path) -> list[Path]:
    """Write what can be drawn as PNG files, and return their paths. A second precision has files of its own.

        time.png       milliseconds against the length, with p10 to p90
        tokens.png     tokens a second
        speedup.png    softmax's time over the attention's
        crossover.png  from which length on softmax is slower, and how sure that is
        memory.png     the most that a call held
        flops.png      stated FLOPs, and their rate as a part of the ceiling
        decode.png     first token, each further one, and the state

    Raises:
        HHBenchError: matplotlib isn't there, or the folder can't be written.
    """
    need_matplotlib()
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with rc_context(SIZES):
            for dtype in profile.ordered("dtype"):
                for name, draw in _drawn(profile, dtype).items():
                    figure = Figure(layout="constrained", figsize=(6.4 * len(draw) + 0.4, 6.2))
                    FigureCanvasAgg(figure)
                    for axes, panel in zip(figure.subplots(1, len(draw), squeeze=False)[0], draw, strict=True):
                        panel(axes)
                    figure.suptitle(_title(profile, dtype))
                    path = folder / (f"{name}.png" if len(profile.ordered("dtype")) == 1 else f"{name}-{dtype}.png")
                    figure.savefig(path)
                    paths.append(path)
    except OSError as error:
        raise HHBenchError(f"plots can't be written to {folder}: {error.strerror or error}") from error
    return paths


def need_matplotlib() -> None:
    """Say that it is missing before anything is measured."""
    if find_spec("matplotlib") is None:
        raise HHBenchError("--plots needs matplotlib: pip install 'hhbench[plot]'")


Value = Callable[[Cell], Sequence[float] | None]
Panel = Callable[[Any], None]  # draws into axes


def _drawn(profile: Profile, dtype: str) -> dict[str, list[Panel]]:
    """By file, its panels; a file without any is left out."""
    by_work = {
        work: [cell for cell in profile.cells if (cell.work, cell.dtype) == (work, dtype) and cell.measured]
        for work in WORDS
    }

    def panels(works: Sequence[str], unit: str, value: Value, title: str | None = None) -> list[Panel]:
        return [
            partial(_panel, profile=profile, title=title or WORDS[work], unit=unit, cells=by_work[work], value=value)
            for work in works
            if any(value(cell) is not None for cell in by_work[work])
        ]

    passes, decoding = ("train", "prefill"), ("first token", "token")
    drawn: dict[str, list[Panel]] = {
        "time": panels(passes, "ms", lambda c: _spread(c, 1e3)),
        "tokens": panels(passes, "tokens/s", lambda c: _one(c.tokens_per_s)),
        "speedup": panels(
            (*passes, "token"),
            "times softmax's speed",
            lambda c: None if is_softmax(c.attention) else _one(speedup(profile, c)),
        ),
        "crossover": [
            partial(_crossovers, profile=profile, work=work, dtype=dtype)
            for work in WORDS
            if any((c.work, c.dtype) == (work, dtype) for c in profile.crossovers)
        ],
        "memory": panels(passes, "MB at most, inputs apart", lambda c: _one(c.peak_bytes, 1e-6)),
        "flops": [
            *panels(passes, "GFLOP of a call, as stated", lambda c: _one(c.flops, 1e-9))[-1:],
            *panels(passes, "MFU, %", lambda c: _one(c.mfu, 100.0)),
        ],
        "decode": [
            *panels(decoding, "ms", lambda c: _spread(c, 1e3)),
            *panels(("token",), "kB kept", lambda c: _one(c.state_bytes, 1e-3), title="state"),
        ],
    }
    return {name: found for name, found in drawn.items() if found}


def _crossovers(axes: Any, profile: Profile, work: str, dtype: str) -> None:
    """A line for each attention: from which length on softmax is slower, and between which it lies with 95 %."""
    found = [c for c in profile.crossovers if (c.work, c.dtype) == (work, dtype)]
    look = styles(profile.ordered("attention"))
    axes.set_xscale("log", base=2)
    for row, one in enumerate(found):
        colour = look[one.attention]["color"]
        if one.low is not None or one.high is not None:
            axes.plot([one.low or one.first, one.high or one.last], [row, row], color=colour, linewidth=5, alpha=0.4)
        if one.length is not None:
            axes.plot([one.length], [row], color=colour, marker="o", markersize=5)
        axes.text(1.02, row, one.said, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.set_yticks(range(len(found)), [one.attention for one in found])
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.set_title(WORDS[work])
    axes.set_xlabel("tokens from which on softmax is slower")
    _lengths(axes, sorted({cell.length for cell in profile.cells if cell.measured}))


def _one(value: float | None, scale: float = 1.0) -> Sequence[float] | None:
    """A number without ends of its own; nothing below 0 can be drawn on a logarithmic scale."""
    return (value * scale,) * 3 if value else None


def _spread(cell: Cell, scale: float) -> Sequence[float] | None:
    if cell.p10 is None or cell.p50 is None or cell.p90 is None:
        return None
    return cell.p50 * scale, cell.p10 * scale, cell.p90 * scale


def _title(profile: Profile, dtype: str) -> str:
    settings = profile.settings
    what = (
        settings.get("task")
        or settings.get("model")
        or (f"one {settings['direction']} layer, {settings['heads']} heads of width {settings['head_dim']}")
    )
    place = profile.environment
    return f"{what}, {dtype}; {place['device']}, {place['threads']} thread{'s' * (place['threads'] > 1)}"


def styles(labels: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A style for each label: of the first seven the colour tells, of further ones the dashes and markers too."""
    found: dict[str, dict[str, Any]] = {}
    softmax_dashes = cycle(DASHES)
    others = 0
    for label in labels:
        if is_softmax(label):
            found[label] = {"color": BLACK, "linestyle": next(softmax_dashes), "marker": "", "linewidth": 2.2}
            continue
        lap, index = divmod(others, len(COLOURS))
        found[label] = {
            "color": COLOURS[index],
            "linestyle": DASHES[lap % len(DASHES)],
            "marker": MARKERS[(index + lap) % len(MARKERS)],
            "linewidth": 1.4,
        }
        others += 1
    return found


def _panel(
    axes: Any,
    profile: Profile,
    title: str,
    unit: str,
    cells: list[Cell],
    value: Value,
) -> None:
    """Lines with a name at the end of each."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ends: list[tuple[str, float, float]] = []
    look = styles(profile.ordered("attention"))
    for label in profile.ordered("attention"):
        points = [(c.length, v) for c in cells if c.attention == label and (v := value(c)) is not None]
        if not points:
            continue
        x = [length for length, _ in points]
        middle, low, high = zip(*(v for _, v in points), strict=True)
        axes.plot(x, middle, markersize=4.5, zorder=3 if is_softmax(label) else 2, **look[label])
        axes.fill_between(x, low, high, color=look[label]["color"], alpha=0.12 if len(look) <= 8 else 0.06, linewidth=0)
        ends.append((label, float(x[-1]), float(middle[-1])))
    axes.set_title(title)
    axes.set_xlabel("tokens")
    axes.set_ylabel(unit)
    _lengths(axes, sorted({cell.length for cell in cells}))
    _name(axes, ends, look)


def _lengths(axes: Any, lengths: Sequence[int]) -> None:
    """The axis of tokens, and nothing around it."""
    shown = lengths if len(lengths) <= 10 else lengths[:: -(-len(lengths) // 10)]
    axes.set_xticks(shown, [_short(length) for length in shown])
    axes.minorticks_off()
    axes.set_xlim(lengths[0] / 1.1, lengths[-1] * 1.1)
    axes.grid(True, which="major", alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _name(axes: Any, ends: list[tuple[str, float, float]], look: dict[str, dict[str, Any]]) -> None:
    """The labels in a column at the right, none over another, each led to from the end of its line."""
    low, high = (axes.transData.transform((1.0, y))[1] for y in axes.get_ylim())
    heights = {label: (axes.transData.transform((x, y))[1] - low) / (high - low) for label, x, y in ends}
    order = sorted(heights, key=lambda label: heights[label])
    for label, place in zip(order, spread([heights[label] for label in order], GAP), strict=True):
        x, y = next((x, y) for name, x, y in ends if name == label)
        colour = look[label]["color"]
        axes.annotate(
            label,
            xy=(x, y),
            xytext=(1.06, place),
            textcoords=axes.transAxes,
            va="center",
            fontsize=9,
            color=colour,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colour, "linewidth": 0.7, "alpha": 0.7, "shrinkA": 1, "shrinkB": 2,
                "linestyle": look[label]["linestyle"],
            },
        )  # fmt: skip


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Heights in rising order moved apart until none is nearer to the next than `gap`, and little beyond 0 and 1."""
    if not heights:
        return []
    gap = min(gap, 1.0 / max(1, len(heights) - 1))
    placed = list(heights)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + gap)
    placed[-1] = min(placed[-1], max(1.0, gap * (len(placed) - 1)))
    for i in range(len(placed) - 2, -1, -1):
        placed[i] = min(placed[i], placed[i + 1] - gap)
    return placed


def _short(length: int) -> str:
    return f"{length // 1024}k" if length >= 1024 and length % 1024 == 0 else str(length)
