"""Pictures of what throughput.py and scaling.py measured, made out of what goes into their JSON files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from measure import machine_line

from lora_delta.plots.figures import COLOURS, decimals, new_figure, plain_text, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_ENGINE, _RIVAL, _INK, _FAINT = COLOURS[0], "#C4C4C4", "#333333", "#777777"

Record = Mapping[str, Any]


def throughput_figure(record: Record) -> Figure:
    """Tokens per second: a panel per table, as their scales differ; a bar for each way, and a line for the floor."""
    runs = record["runs"]
    slots = max(1, *(len(run["ways"]) for run in runs))
    scaled = {own["adapters_timed"] for run in runs for own in run["ways"].values() if _is_scaled(own, run)}
    below = [machine_line(record["machine"])] + [f"* timed on {n} adapters, scaled" for n in sorted(scaled)]
    with style():
        figure = new_figure(max(8, 4.8 * len(runs)), 1.7 + 0.34 * slots)
        _frame(figure, f"{record['model']}, {record['loss']}, rank {record['rank']}", below)
        for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
            _bars(axes, run, slots)
    return figure


def _bars(axes: Axes, run: Record, slots: int) -> None:
    """One panel, with room for ``slots`` bars, so that they are as thick in all panels."""
    from matplotlib.patheffects import withStroke

    tokens = run["texts"]["tokens"] * (1 if run["texts"]["kind"] == "own examples" else run["adapters"])
    floor = tokens / run["floor"]["seconds"]["median"]
    rates = [own["tokens_per_second"] for own in run["ways"].values()]
    names = [way + "*" * _is_scaled(own, run) for way, own in run["ways"].items()]
    form = decimals([*rates, floor])
    colours = [_ENGINE if way.startswith(("engine", "compute_labels")) else _RIVAL for way in names]
    bars = axes.barh(range(len(rates)), rates, 0.7, color=colours)
    halo = [withStroke(linewidth=3, foreground="white")]  # over the floor's line, where a way comes close to it
    for text in axes.bar_label(bars, [f"{rate:{form}}" for rate in rates], padding=3, fontsize=9, color=_INK):
        text.set(path_effects=halo, zorder=4)
    axes.axvline(floor, color=_INK, linewidth=1.2, linestyle="--", zorder=3)
    axes.annotate(
        f"floor {floor:{form}}", (floor, 1), (0, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
        ha="center", va="bottom", fontsize=9, color=_INK,
    )  # fmt: skip
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelcolor=_INK)
    axes.grid(False, axis="y")
    axes.locator_params(axis="x", nbins=6)
    # The first way on top; to the right, room for the label of the longest bar.
    axes.set(xlim=(0, 1.15 * max([floor, *rates])), ylim=(slots - 0.4, -0.6), xlabel="tokens/s")
    axes.set_title(f"{run['dtype']}, G = {run['adapters']}, {run['texts']['count']} {run['texts']['kind']}", pad=17)


def _is_scaled(own: Record, run: Record) -> bool:
    """Whether a way was timed on fewer adapters: the star in the table."""
    return own["adapters_timed"] < run["adapters"]


def scaling_figure(record: Record) -> Figure:
    """A row over the adapters and one over the tokens, where there are points: time to the left, memory to the right.

    Raises:
        ValueError: no series has points.
    """
    families: dict[bool, list[Record]] = {}  # over the tokens?
    for series in record["series"]:
        if series["points"]:
            families.setdefault(series["name"] == "probes", []).append(series)
    if not families:
        raise ValueError("record has no points, expected one at least")
    with style():
        figure = new_figure(10, 1 + 2.9 * len(families))
        title = f"{record['model']}, {record['way']}, rank {record['rank']}, {record['dtype']}"
        _frame(figure, title, [machine_line(record["machine"])])
        rows = figure.subplots(len(families), 2, squeeze=False)
        for (left, right), over_tokens in zip(rows, sorted(families), strict=True):
            _curves(left, right, families[over_tokens], over_tokens)
    return figure


def _curves(left: Axes, right: Axes, family: Sequence[Record], over_tokens: bool) -> None:
    """One row of panels: time per adapter or per token, and memory over the weights with the gradients in it."""
    x, per, factor = ("tree_tokens", "token", 1e6) if over_tokens else ("adapters", "adapter", 1e3)
    gradients: dict[int, float] = {}  # the same in all series
    for number, series in enumerate(family):
        points = sorted(series["points"], key=lambda point: point[x])
        counts = [point[x] for point in points]
        first = points[0]
        label = "in one pass" if first["per_pass"] is None else f"in passes of {first['per_pass']}"
        look: Any = {"color": COLOURS[2 if over_tokens else number], "linewidth": 1.5, "markersize": 4}
        look |= {"marker": "os"[number % 2], "label": f"G = {first['adapters']}" if over_tokens else label}
        times = [factor * point[f"seconds_per_{per}"] for point in points]
        seconds = [(time, point["seconds"]) for time, point in zip(times, points, strict=True)]
        whiskers = [[abs(own[end] / own["median"] - 1) * time for time, own in seconds] for end in ("min", "max")]
        left.errorbar(counts, times, whiskers, capsize=2.5, elinewidth=1, **look)
        right.plot(counts, [point["step_bytes"] / 1e9 for point in points], **look)
        gradients |= {point[x]: point["gradient_bytes"] / 1e9 for point in points}
    held: Any = {"linestyle": "--", "linewidth": 1, "color": _FAINT, "label": "the gradients in it"}
    right.plot(*zip(*sorted(gradients.items()), strict=True), **held)
    left.set_ylabel(f"time per {per}, {'µs' if over_tokens else 'ms'}")
    right.set_ylabel("memory over the weights, GB")
    for axes in (left, right):
        axes.margins(y=0.08)
        axes.set_ylim(bottom=0)
        if over_tokens:
            axes.set_xlim(left=0)
            axes.set_xlabel("tokens in the prefix tree")
        else:
            axes.set_xscale("log", base=2)
            axes.set_xticks(_apart(gradients), [str(count) for count in _apart(gradients)])
            axes.minorticks_off()
            axes.set_xlabel(f"adapters G, {family[0]['points'][0]['probes']} probes")
        place: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1)}  # above the panel, where it hides nothing
        axes.legend(ncols=3, borderaxespad=0.1, columnspacing=1.2, handlelength=1.8, **place)


def _apart(counts: Iterable[int]) -> list[int]:
    """Those of the counts whose labels do not touch on a logarithmic axis, the largest among them."""
    counts = sorted(counts, reverse=True)
    nearest = math.log2(counts[0] / counts[-1]) / 14
    kept = counts[:1]
    for count in counts[1:]:
        if math.log2(kept[-1] / count) >= nearest:
            kept.append(count)
    return kept[::-1]


def _frame(figure: Figure, title: str, below: Sequence[str]) -> None:
    """Title on top, small lines at the bottom."""
    width = figure.get_figwidth()
    figure.suptitle(plain_text(title, int(9 * width)), x=0.008, ha="left", fontsize=11)
    lines = [line for text in below for line in textwrap.wrap(plain_text(text, 200), int(16 * width))]
    figure.supxlabel("\n".join(lines), x=0.008, ha="left", fontsize=7.5, color=_FAINT)
