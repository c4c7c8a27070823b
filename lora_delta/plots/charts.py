"""Plots of deltas, losses and verdicts as PNG files, and the projection and the score behind the first.

They need matplotlib and scikit-learn, ``pip install 'qwen-functional[plots]'``. ``figures.py`` has how a figure is
drawn and written.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .figures import COLOURS, check_png, decimals, new_figure, plain_text, require_sklearn, save_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = ("euclidean", "cosine")

_MARKERS = {  # scales that make the markers look equally large
    "o": 1.0, "s": 0.9, "^": 1.1, "D": 0.75, "v": 1.1, "P": 1.2, "X": 1.2, "*": 1.9, "<": 1.1, ">": 1.1, "p": 1.2,
    "h": 1.1,
}  # fmt: skip
_INKS = ("#005A8E", "#9A6A00", "#00694C", "#A44800", "#9C4F78", "#22719F", "#333333")  # the colours, darker, for text
_LINES = ("-", "--", "-.", ":")


def project_2d(deltas: Tensor) -> tuple[Tensor, Tensor]:
    """The first two principal components of deltas (N, H), in float64.

    They are scikit-learn's, signs included: the largest coefficient of a component is positive.

    Returns:
        Points (N, 2), and the share (2,) of the variance that each component explains; 0 if there is no variance.

    Raises:
        ValueError: not (N, H) with N and H of 2 or more, not floating point, not finite.
        ImportError: scikit-learn is not installed.
    """
    deltas = _checked_vectors("deltas", deltas)
    if min(deltas.shape) < 2:
        raise ValueError(f"deltas has shape {tuple(deltas.shape)}, expected two or more of each")
    if torch.equal(deltas, deltas[:1].expand_as(deltas)):
        return deltas.new_zeros(len(deltas), 2), deltas.new_zeros(2)
    pca = require_sklearn().decomposition.PCA(2, svd_solver="full")
    points = torch.as_tensor(pca.fit_transform(deltas.numpy()))
    return points, torch.as_tensor(pca.explained_variance_ratio_)


def silhouette_score(points: Tensor, classes: Sequence[Hashable] | Tensor, metric: str = "euclidean") -> float:
    """Mean silhouette of points in their classes: from −1 (among another class) through 0 to 1 (far from all others).

    A point's silhouette is ``(b − a) / max(a, b)``, where a is its mean distance to the others of its class and b that
    to the nearest other class (Rousseeuw 1987, doi 10.1016/0377-0427(87)90125-7); 0 if it is alone in its class.
    scikit-learn computes it.

    Args:
        points: (N, H); computed in float64.
        classes: the class of each point.
        metric: ``"euclidean"``, or ``"cosine"`` for 1 − cosine similarity, which is 1 for a vector of zeros.

    Raises:
        ValueError: an unknown metric, fewer than two classes, no two points in one class, ``classes`` and ``points`` of
            different lengths, points that are not (N, H), floating point and finite.
        ImportError: scikit-learn is not installed.
    """
    if metric not in METRICS:
        raise ValueError(f"metric is {metric!r}, expected one of {METRICS}")
    points = _checked_vectors("points", points)
    index, names = _indexed(classes, len(points))
    if not 2 <= len(names) < len(points):
        raise ValueError(f"{len(points)} points are in {len(names)} classes, expected 2 to {len(points) - 1}")
    return float(require_sklearn().metrics.silhouette_score(points.numpy(), index.numpy(), metric=metric))


def plot_deltas(
    deltas: Tensor,
    classes: Sequence[Hashable] | Tensor | None = None,
    names: Sequence[str] | None = None,
    *,
    marks: Sequence[Hashable] | None = None,
    path: str | Path,
    title: str = "Deltas",
    metric: str = "euclidean",
) -> Path:
    """Deltas in the plane of their first two principal components, as a PNG.

    It has 1200 × 780 pixels, or 1500 × 1020 if the legend has more than 20 entries.

    Args:
        deltas: (N, H).
        classes: the class of each delta: its colour and marker, with a legend; designed for up to 40. The title gives
            the silhouette score, of the deltas themselves, not of the points drawn.
        names: the name of each delta: points are numbered, and the legend lists numbers and names; up to 60.
        marks: a second class of each delta, instead of names: markers then show these, and colours the first.
        path: where to write; its folder is made.
        metric: the metric of the silhouette score.

    Returns:
        The path.

    Raises:
        ValueError: as :func:`project_2d`, a number of classes or names that is not that of deltas, an unknown metric, a
            path that does not end in ``.png``.
        ImportError: matplotlib or scikit-learn is not installed.
    """
    points, explained = project_2d(deltas)
    index, class_names = _indexed(classes if classes is not None else [""] * len(points), len(points))
    if names is not None and len(names) != len(points):
        raise ValueError(f"there are {len(names)} names, expected one for each of {len(points)} deltas")
    subtitle = f"{len(points)} adapters"
    if classes is not None:
        subtitle += f" in {len(class_names)} class{'es' if len(class_names) > 1 else ''}"
        if 2 <= len(class_names) < len(points):
            subtitle += f", silhouette {silhouette_score(deltas, classes, metric):.2f} ({metric})"
    marked = None if marks is None else _indexed(marks, len(points))
    if marked is not None and names is not None:
        raise ValueError("names and marks are both given, expected one of them")
    area = 42 if len(points) <= 150 else 26 if len(points) <= 600 else 12
    markers = list(_MARKERS.items())
    entries = len(class_names) + len(names or ()) + (0 if marked is None else len(marked[1]))
    with _drawing(path, *((10, 6.8) if entries > 20 else (8, 5.2))) as (figure, axes):
        number = 0
        for place, class_name in enumerate(class_names):
            members = (index == place).nonzero()[:, 0].tolist()
            colour, (marker, scale) = COLOURS[place % len(COLOURS)], markers[place % len(markers)]
            if marked is not None:
                for member in members:
                    shape, size = markers[int(marked[0][member]) % len(markers)]
                    x, y = points[member].tolist()
                    dot = axes.scatter([x], [y], size * area, colour, marker=shape, alpha=0.85)
                    dot.set(edgecolor="white", linewidth=0.5)
                axes.plot([], [], "o", color=colour, markersize=6, label=plain_text(class_name))
                continue
            x, y = points[members].T.tolist()
            label = plain_text(class_name) if classes is not None else None
            drawn = axes.scatter(x, y, scale * area, colour, marker=marker, label=label, alpha=0.85)
            drawn.set(edgecolor="white", linewidth=0.5)
            if names is None:
                continue
            for member in members:
                number += 1
                axes.plot([], [], " ", label=plain_text(f"{number} {names[member]}"))  # a line in the legend
                at, ink = (float(points[member, 0]), float(points[member, 1])), _INKS[place % len(_INKS)]
                axes.annotate(str(number), at, (3, 3), textcoords="offset points", fontsize=6, color=ink)
        for place, mark in enumerate(marked[1] if marked is not None else ()):
            axes.plot([], [], markers[place % len(markers)][0], color="#777777", markersize=6, label=plain_text(mark))
        axes.set_aspect("equal", "datalim")
        axes.margins(0.08)
        first, second = (f"{share:.0%}" for share in explained.tolist())
        axes.set(xlabel=f"first principal component, {first} of the variance", ylabel=f"second, {second}")
        axes.set_title(f"{plain_text(title, 90)}\n{subtitle}")
        if classes is not None or names is not None:
            _legend(figure, axes)
    return Path(path)


def plot_loss_curves(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    path: str | Path,
    *,
    title: str = "",
    ylabel: str = "loss",
    xlabel: str = "step",
    log: bool | None = None,
) -> Path:
    """Losses by step, or other values by what ``xlabel`` says, as a PNG of 1200 × 675 pixels.

    Args:
        curves: {label: [(step, value), …]}. A value that is not finite leaves a gap.
        path: where to write; its folder is made.
        log: whether the y axis is logarithmic; None: if all values are positive and span a factor of 20 or more.

    Returns:
        The path.

    Raises:
        ValueError: no curves, a curve without a finite value, a path that does not end in ``.png``.
        ImportError: matplotlib is not installed.
    """
    if not curves:
        raise ValueError("curves is empty, expected at least one")
    finite = {label: [float(v) for _, v in curve if math.isfinite(v)] for label, curve in curves.items()}
    for label, values in finite.items():
        if not values:
            raise ValueError(f"curve {label!r} has no finite value, expected [(step, value), …]")
    lowest, highest = min(map(min, finite.values())), max(map(max, finite.values()))
    with _drawing(path, 8, 4.5) as (figure, axes):
        for number, (label, curve) in enumerate(curves.items()):
            style = _LINES[number // len(COLOURS) % len(_LINES)]
            axes.plot(
                [step for step, _ in curve],
                [float(value) if math.isfinite(value) else math.nan for _, value in curve],
                style,
                color=COLOURS[number % len(COLOURS)],
                linewidth=1.5,
                marker="o" if len(curve) <= 20 else None,
                markersize=3.5,
                label=plain_text(label),
            )
        if log or (log is None and lowest > 0 and 20 * lowest <= highest):
            axes.set_yscale("log")
        axes.locator_params(axis="x", integer=True)
        axes.set(xlabel=plain_text(xlabel), ylabel=plain_text(ylabel), title=plain_text(title, 90))
        if len(curves) > 1:
            _legend(figure, axes)
    return Path(path)


def plot_verdict(figures: Mapping[str, Mapping[str, Mapping[str, Any]]], path: str | Path) -> Path:
    """The accuracy of each way with its interval, from :func:`lora_delta.generate.judge.figures`: a bar for each group
    next to the way's name, as a PNG 1200 pixels wide, whose height grows with the number of ways.

    Raises:
        ValueError: no groups, a path that does not end in ``.png``.
        ImportError: matplotlib is not installed.
    """
    ways = list(dict.fromkeys(way for group in figures.values() for way in group))
    if not ways:
        raise ValueError("figures is empty, expected {group: {way: figures}}")
    thick = 0.8 / len(figures)
    with _drawing(path, 8, 1.2 + 0.3 * len(ways) * (1 if len(figures) == 1 else 1.6)) as (figure, axes):
        for number, (group, own) in enumerate(figures.items()):
            offset = (number - (len(figures) - 1) / 2) * thick
            places = [place + offset for place, way in enumerate(ways) if way in own]
            each = [own[way] for way in ways if way in own]
            values = [100 * one["accuracy"] for one in each]
            highs = [100 * max(one["accuracy_interval"][1], one["accuracy"]) for one in each]
            lows = [100 * min(one["accuracy_interval"][0], one["accuracy"]) for one in each]
            axes.barh(places, values, thick * 0.9, color=COLOURS[number % len(COLOURS)], label=plain_text(group))
            sides = [
                [value - low for value, low in zip(values, lows, strict=True)],
                [high - value for value, high in zip(values, highs, strict=True)],
            ]
            axes.errorbar(
                values, places, xerr=sides, fmt="none", ecolor="#333333", elinewidth=0.8, capsize=2
            )
            for place, value, high in zip(places, values, highs, strict=True):
                at = (high, place)
                axes.annotate(
                    f"{value:.1f}", at, (4, 0), textcoords="offset points", va="center", fontsize=8.5, color="#333333"
                )
        axes.set_yticks(range(len(ways)), [plain_text(way, 48) for way in ways])
        axes.invert_yaxis()  # the first on top
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.08, y=0.02)
        axes.set_xlim(left=0)
        title = "Completions that are right, greedily decoded"
        title += f": {plain_text(next(iter(figures)), 60)}" if len(figures) == 1 else ""
        axes.set(xlabel="%", title=title)
        if len(figures) > 1:
            _legend(figure, axes)
    return Path(path)


def plot_bars(
    groups: Mapping[str, Mapping[str, float]],
    path: str | Path,
    *,
    title: str = "",
    ylabel: str = "",
) -> Path:
    """A table as grouped bars with their values, as a PNG of 1200 × 675 pixels.

    Args:
        groups: {group: {series: value}}, the same series in every group; NaN, an unknown value, has no bar.
        path: where to write; its folder is made.

    Returns:
        The path.

    Raises:
        ValueError: no groups, groups with different series, an infinite value, a path that does not end in ``.png``.
        ImportError: matplotlib is not installed.
    """
    series = list(next(iter(groups.values()), {}))
    if not series:
        raise ValueError("groups is empty, expected {group: {series: value}}")
    for group, values in groups.items():
        if set(values) != set(series):
            raise ValueError(f"group {group!r} has the series {sorted(values)}, expected {sorted(series)}")
        for name, value in values.items():
            if math.isinf(value):
                raise ValueError(f"{name!r} of group {group!r} is {value}, expected a finite number, or NaN")
    bars = len(groups) * len(series)
    with _drawing(path, 8, 4.5) as (figure, axes):
        width, form = 0.8 / len(series), decimals([v for values in groups.values() for v in values.values()])
        for number, name in enumerate(series):
            offset = (number - (len(series) - 1) / 2) * width
            heights = [float(values[name]) for values in groups.values()]
            container = axes.bar(
                [place + offset for place in range(len(groups))],
                heights,
                width * 0.92,
                color=COLOURS[number % len(COLOURS)],
                hatch=("", "//", "..", "xx")[number // len(COLOURS) % 4],
                edgecolor="white",
                linewidth=0,
                label=plain_text(name),
            )
            if bars <= 40:
                numbers = ["" if math.isnan(h) else f"{h:{form}}".replace("-", "−") for h in heights]
                size = 8.5 if bars <= 16 else 7 if bars <= 26 else 5.5
                axes.bar_label(container, numbers, padding=2, fontsize=size, color="#333333")
        axes.axhline(0, color="#888888", linewidth=0.6)
        axes.grid(False, axis="x")
        axes.margins(x=0.02, y=0.1)
        axes.tick_params(axis="x", length=0)
        room = 80 // len(groups)  # characters under a group
        names = [plain_text(group, 60) for group in groups]
        if max(len(word) for name in names for word in (name.split() or [""])) <= room:
            axes.set_xticks(range(len(groups)), [textwrap.fill(name, room) for name in names])
        else:
            axes.set_xticks(range(len(groups)), names, rotation=30, ha="right", rotation_mode="anchor")
        axes.set(ylabel=plain_text(ylabel), title=plain_text(title, 90))
        if len(series) > 1:
            _legend(figure, axes)
    return Path(path)


@contextmanager
def _drawing(path: str | Path, width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of a given size in inches, written to ``path`` on exit."""
    check_png(path)
    with style():
        figure = new_figure(width, height)
        yield figure, figure.add_subplot()
        save_figure(figure, path)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    rows = round(6 * figure.get_figheight())
    columns = math.ceil(len(labels) / rows)
    size = 8.5 if len(labels) <= 22 else 7
    figure.legend(handles, labels, loc="outside right upper", ncols=columns, fontsize=size, columnspacing=1)


def _checked_vectors(name: str, vectors: Tensor) -> Tensor:
    """(N, H) in float64 on the CPU, detached."""
    if not isinstance(vectors, Tensor) or vectors.dim() != 2 or not vectors.is_floating_point():
        what = f"{vectors.dtype} {tuple(vectors.shape)}" if isinstance(vectors, Tensor) else type(vectors).__name__
        raise ValueError(f"{name} is {what}, expected floating-point (N, H)")
    if not vectors.isfinite().all():
        raise ValueError(f"{name} is not finite: it holds NaN or infinity")
    return vectors.detach().cpu().double()


def _indexed(classes: Sequence[Hashable] | Tensor, count: int) -> tuple[Tensor, list[Hashable]]:
    """The class of each point as a number, and the classes in order of their first point."""
    each = classes.tolist() if isinstance(classes, Tensor) else list(classes)
    if len(each) != count:
        raise ValueError(f"there are {len(each)} classes, expected one for each of {count} points")
    numbers = {name: number for number, name in enumerate(dict.fromkeys(each))}
    return torch.tensor([numbers[name] for name in each]), list(numbers)
