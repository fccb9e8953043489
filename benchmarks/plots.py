"""The plots for the documentation, as SVG that is readable on light and dark pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .contenders import ALL
from .ours import BACKLOGS
from .results import Entry, Results
from .stores import title_of

_INK = "#808080"
"""Colour of text and axes, readable on white and on black."""
_COLOURS = {
    "sqlite": "#3b82c4",
    "postgresql": "#7a5cc2",
    "mariadb": "#c27a3b",
    "redis": "#c0504d",
}
_STYLE = {
    "svg.fonttype": "none",
    # Fixed, so that the same figures always produce the same file.
    "svg.hashsalt": "benchmarks",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_WIDTH, _ROW, _FRAME = 7.5, 0.28, 1.1
"""In inches."""
_SLOWEST = 10
"""Start of the bars in jobs per second, because a logarithmic scale has no zero."""


def write_plots(results: Results, folder: Path) -> None:
    """Write a file for each measurement that has a plot and results."""
    import matplotlib as mpl

    mpl.use("svg")
    folder.mkdir(exist_ok=True)
    with mpl.rc_context(_STYLE):
        for name, draw in _PLOTS.items():
            entries = {
                contender: entry
                for contender, entry in results.entries.get(name, {}).items()
                if entry.failure is None
            }
            if entries:
                draw(entries, folder / f"{name}.svg")


def _throughput(entries: dict[str, Entry], path: Path) -> None:
    """Bars, with the fastest at the top."""
    speeds = {name: entry.medians()["jobs_per_second"] for name, entry in entries.items()}
    order = sorted(speeds, key=lambda name: speeds[name])
    figure, axes = _axes(len(order))
    bars = axes.barh(
        [_label(name) for name in order],
        [speeds[name] for name in order],
        color=[_COLOURS[ALL[name].store] for name in order],
    )
    axes.bar_label(bars, [f" {speeds[name]:,.0f}" for name in order], color=_INK)
    _log_scale(axes)
    axes.set_xlim(left=_SLOWEST)
    axes.set_xlabel("jobs per second, logarithmic")
    _save(figure, path)


def _latency(entries: dict[str, Entry], path: Path) -> None:
    """A line from p50 to p99 for each contender, with a mark at each percentile."""
    found = {name: entry.medians() for name, entry in entries.items()}
    order = sorted(found, key=lambda name: -found[name]["p50_ms"])
    figure, axes = _axes(len(order))
    for row, name in enumerate(order):
        points = [found[name][key] for key in ("p50_ms", "p95_ms", "p99_ms")]
        colour = _COLOURS[ALL[name].store]
        axes.plot([points[0], points[-1]], [row, row], color=colour, linewidth=2)
        for point, marker in zip(points, "o|x", strict=True):
            axes.plot(point, row, marker=marker, color=colour, markersize=7)
    axes.set_yticks(range(len(order)), [_label(name) for name in order])
    _log_scale(axes)
    axes.set_xlabel("ms until a job runs, logarithmic: o p50, | p95, x p99")
    _save(figure, path)


def _backlog(entries: dict[str, Entry], path: Path) -> None:
    """A panel for each database, with a line for each kind of backlog."""
    figure, panels = _axes(10, columns=len(entries))
    for axes, (name, entry) in zip(panels, entries.items(), strict=True):
        figures = entry.medians()
        for kind in BACKLOGS:
            points = sorted(
                (int(size), figures[key])
                for key in figures
                for of, _, size in [key.partition("_")]
                if of in ("none", kind) and size.isdigit()
            )
            axes.plot(range(len(points)), [speed for _, speed in points], marker="o", label=kind)
            axes.set_xticks(range(len(points)), [f"{size:,}" for size, _ in points])
        axes.set_ylim(bottom=0)
        axes.set_title(title_of(ALL[name].store), color=_INK)
        axes.set_xlabel("other rows")
    panels[0].set_ylabel("jobs per second")
    panels[0].legend(labelcolor=_INK)
    _save(figure, path)


def _memory(entries: dict[str, Entry], path: Path) -> None:
    """MiB above the idle worker, by number of jobs."""
    figure, axes = _axes(10)
    for name, entry in entries.items():
        curve: Any = entry.runs[0]["curve"]
        counts, mib = zip(*curve, strict=True)
        store = ALL[name].store
        axes.plot(counts, mib, color=_COLOURS[store], label=title_of(store))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("jobs done by one worker")
    axes.set_ylabel("MiB above the idle worker")
    axes.legend(labelcolor=_INK)
    _save(figure, path)


_PLOTS: dict[str, Callable[[dict[str, Entry], Path], None]] = {
    "throughput": _throughput,
    "latency": _latency,
    "backlog": _backlog,
    "memory": _memory,
}


def _axes(rows: int, columns: int | None = None) -> tuple[Any, Any]:
    """A figure with room for a number of rows, and its axes: one, or a list of ``columns``."""
    import matplotlib.pyplot as plt

    size = (_WIDTH, rows * _ROW + _FRAME)
    if columns is None:
        return plt.subplots(figsize=size, layout="constrained")
    figure, panels = plt.subplots(
        1, columns, figsize=size, layout="constrained", sharey=False, squeeze=False
    )
    return figure, panels[0]


def _log_scale(axes: Any) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.xaxis.set_minor_formatter(lambda *_: "")


def _label(name: str) -> str:
    return f"{ALL[name].title} ({title_of(ALL[name].store)})"


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)
