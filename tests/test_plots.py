"""Pictures are written whole and in their size; the measures in them equal their definitions."""

from __future__ import annotations

import math
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_delta.plots.charts import (
    plot_bars,
    plot_deltas,
    plot_loss_curves,
    plot_verdict,
    project_2d,
    silhouette_score,
)

CURVES = {"train": [(0, 1.0), (10, 0.1), (20, math.nan), (30, 0.01)], "held out $x_1$": [(0, 2.0), (30, 0.5)]}
BARS = {"math": {"base": 0.2, "ours": 0.6}, "code": {"base": math.nan, "ours": -0.1}}


def deltas(n: int = 40, hidden: int = 12, n_classes: int = 8) -> tuple[Tensor, list[str]]:
    """Points around a centre for each class, and the classes' names."""
    generator = torch.Generator().manual_seed(0)
    index = torch.arange(n) % n_classes
    centres = torch.randn(n_classes, hidden, generator=generator)
    return centres[index] + 0.4 * torch.randn(n, hidden, generator=generator), [f"task {i}" for i in index.tolist()]


@pytest.mark.parametrize("shape", [(40, 12), (5, 30), (2, 3), (3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_projection_is_onto_the_largest_singular_vectors(shape: tuple[int, int], dtype: torch.dtype) -> None:
    points = 3 + torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    projected, explained = project_2d(points)
    centred = points.double() - points.double().mean(0)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    assert projected.dtype == torch.float64
    expected = centred @ vectors[:2].T
    signs = torch.where((projected * expected).sum(0) < 0, -1.0, 1.0).double()
    torch.testing.assert_close(projected * signs, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(explained, values[:2].square() / values.square().sum(), rtol=0, atol=1e-9)


def test_the_signs_of_a_projection_do_not_depend_on_the_order_of_the_deltas() -> None:
    points, _ = deltas()
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(project_2d(points[order])[0], project_2d(points)[0][order])


def test_equal_deltas_have_a_projection_of_zero() -> None:
    points, explained = project_2d(torch.ones(4, 3))
    assert not points.any()
    assert not explained.any()


def silhouette_by_definition(points: Tensor, classes: list[str], metric: str) -> float:
    rows = points.double()
    if metric == "cosine":
        rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-300)
        distances = 1 - rows @ rows.T
    else:
        distances = (rows[:, None] - rows[None]).norm(dim=2)
    scores = []
    for i, own in enumerate(classes):
        means = {}
        for name in set(classes):
            members = [j for j, other in enumerate(classes) if other == name and j != i]
            means[name] = float(distances[i, members].mean()) if members else math.nan
        a, b = means.pop(own), min(means.values())
        scores.append(0.0 if math.isnan(a) or max(a, b) < 1e-12 else (b - a) / max(a, b))
    return sum(scores) / len(scores)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("n_classes", [2, 8, 39])
def test_the_silhouette_is_that_of_its_definition(metric: str, n_classes: int) -> None:
    points, classes = deltas(n_classes=n_classes)
    points[3] = points[3 + n_classes] if n_classes < 10 else 0  # two equal points, or one at zero
    expected = silhouette_by_definition(points, classes, metric)
    assert silhouette_score(points, classes, metric) == pytest.approx(expected, abs=1e-9)
    numbers = torch.tensor([int(name.removeprefix("task ")) for name in classes])
    assert silhouette_score(points, numbers, metric) == silhouette_score(points, classes, metric)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_one_alone_in_its_class_and_equal_points_count_0(metric: str) -> None:
    points, classes = torch.ones(5, 3, dtype=torch.float64), ["a", "a", "b", "b", "c"]
    assert silhouette_score(points, classes, metric) == pytest.approx(0, abs=1e-12)
    points[:3] = torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = silhouette_by_definition(points, classes, metric)
    assert silhouette_score(points, classes, metric) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    ("compute", "message"),
    [
        (lambda: silhouette_score(torch.ones(3, 2), ["a"] * 3), "3 points are in 1 classes, expected 2 to 2"),
        (lambda: silhouette_score(torch.ones(3, 2), ["a", "b", "c"]), "3 points are in 3 classes, expected 2 to 2"),
        (lambda: silhouette_score(torch.ones(3, 2), ["a", "b"]), "there are 2 classes, expected one for each of 3"),
        (lambda: silhouette_score(torch.ones(3, 2), "aab", "l1"), r"metric is 'l1', expected one of \('euclidean', "),
        (lambda: silhouette_score(torch.ones(3), "aab"), r"points is torch.float32 \(3,\), expected floating-point"),
        (lambda: silhouette_score([[1.0]], "a"), "points is list, expected floating-point"),  # type: ignore[arg-type]
        (lambda: project_2d(torch.ones(3, 2).long()), r"deltas is torch.int64 \(3, 2\), expected floating-point"),
        (lambda: project_2d(torch.ones(1, 2)), r"deltas has shape \(1, 2\), expected two or more of each"),
        (lambda: project_2d(torch.full((3, 2), math.inf)), "deltas is not finite: it holds NaN or infinity"),
    ],
)
def test_bad_points_are_refused(compute: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compute()


def size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header of a PNG."""
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:24])


def drawn_deltas(path: Path, **options: Any) -> Path:
    points, classes = deltas()
    return plot_deltas(points, path=path, **{"classes": classes, **options})


VERDICT = {
    "generated": {"accuracy": 0.5, "accuracy_interval": (0.4, 0.7)},
    "another's": {"accuracy": 0.0, "accuracy_interval": (0.0, 0.0)},
    "bare": {"accuracy": 1.0, "accuracy_interval": (1.0, 1.0)},
}
PLOTS: dict[str, tuple[Callable[[Path], Path], tuple[int, int]]] = {
    "deltas": (drawn_deltas, (1200, 780)),
    "deltas without classes": (lambda path: drawn_deltas(path, classes=None), (1200, 780)),
    "deltas with names": (lambda path: drawn_deltas(path, names=[f"_{i}$" for i in range(40)]), (1500, 1020)),
    "deltas in one class": (lambda path: drawn_deltas(path, classes=[0] * 40), (1200, 780)),
    "forty classes": (lambda path: drawn_deltas(path, classes=torch.arange(40) % 39), (1500, 1020)),
    "equal deltas": (lambda path: plot_deltas(torch.ones(3, 2), "aab", path=path), (1200, 780)),
    "curves": (lambda path: plot_loss_curves(CURVES, path, title="$ and _"), (1200, 675)),
    "one curve of one step": (lambda path: plot_loss_curves({"loss": [(0, -1.0)]}, path), (1200, 675)),
    "bars": (lambda path: plot_bars(BARS, path, ylabel="accuracy"), (1200, 675)),
    "a verdict": (lambda path: plot_verdict({"held-out": VERDICT}, path), (1200, 315)),
    "a verdict of two groups": (
        lambda path: plot_verdict({"seen": {**VERDICT, "its $teacher_": VERDICT["bare"]}, "held-out": VERDICT}, path),
        (1200, 468),
    ),
    "many bars": (
        lambda path: plot_bars({f"a long name {i}": {str(j): i - j for j in range(9)} for i in range(9)}, path),
        (1200, 675),
    ),
}


# matplotlib 3.9 calls what newer releases of pyparsing are about to drop.
@pytest.mark.filterwarnings("error", "ignore::DeprecationWarning:matplotlib", "ignore:'parseAll':DeprecationWarning")
@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_written_alone_in_its_size_and_the_same_every_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it fails
    plot, pixels = PLOTS[name]
    path = tmp_path / "new folder" / "plot.png"
    before = matplotlib.rcParams.copy()
    assert plot(path) == path
    assert size(path) == pixels
    assert path.stat().st_size > 5000
    first = path.read_bytes()
    plot(path)
    assert path.read_bytes() == first
    assert list(path.parent.iterdir()) == [path]
    assert matplotlib.rcParams.copy() == before


def test_a_plot_that_fails_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    path = plot_bars(BARS, tmp_path / "plot.png")
    before = path.read_bytes()

    def savefig(_: Any, file: Path, **__: Any) -> None:
        file.write_bytes(b"half a picture")
        raise OSError("the disk is full")

    monkeypatch.setattr(figure.Figure, "savefig", savefig)
    with pytest.raises(OSError, match="the disk is full"):
        plot_loss_curves(CURVES, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_title_shows_the_silhouette_of_the_deltas_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    titles: list[str] = []
    write_title = lambda self, file, **_: file.write_text(self.axes[0].get_title("left"))  # noqa: E731
    monkeypatch.setattr(figure.Figure, "savefig", write_title)
    points, classes = deltas()
    for given, options in ((classes, {}), (classes, {"metric": "cosine"}), (["one"] * 40, {}), (None, {})):
        titles.append(plot_deltas(points, given, path=tmp_path / "plot.png", **options).read_text().split("\n")[1])
    scores = [silhouette_score(points, classes, metric) for metric in ("euclidean", "cosine")]
    assert titles == [
        f"40 adapters in 8 classes, silhouette {scores[0]:.2f} (euclidean)",
        f"40 adapters in 8 classes, silhouette {scores[1]:.2f} (cosine)",
        "40 adapters in 1 class",
        "40 adapters",
    ]


def test_the_legend_names_every_class_once_and_every_numbered_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    figures: list[Any] = []

    def kept(figure: Any, file: Path, **_: Any) -> None:
        figures.append(figure)
        file.touch()

    monkeypatch.setattr(figure_module.Figure, "savefig", kept)
    points, classes = deltas()
    drawn_deltas(tmp_path / "plot.png", names=[f"adapter {i}" for i in range(40)])
    drawn_deltas(tmp_path / "plot.png")
    texts = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in figures]
    expected, number = [], 0
    for name in dict.fromkeys(classes):
        expected.append(name)
        for i in [i for i, other in enumerate(classes) if other == name]:
            number += 1
            expected.append(f"{number} adapter {i}")
    assert texts == [expected, list(dict.fromkeys(classes))]
    projected, _ = project_2d(points)
    axes = figures[0].axes[0]
    for note in axes.texts:
        i = int(next(line for line in expected if line.startswith(f"{note.get_text()} adapter")).split()[-1])
        assert note.xy == pytest.approx(tuple(projected[i].tolist()))
    assert len(axes.texts) == 40
    assert not figures[1].axes[0].texts


@pytest.mark.parametrize(
    ("plot", "message"),
    [
        (lambda path: drawn_deltas(path.with_suffix(".pdf")), r"plot.pdf', expected the name of a .png file"),
        (lambda path: drawn_deltas(path, classes=["a"]), "there are 1 classes, expected one for each of 40"),
        (lambda path: drawn_deltas(path, names=["a"]), "there are 1 names, expected one for each of 40"),
        (lambda path: drawn_deltas(path, metric="l1"), "metric is 'l1', expected one of"),
        (lambda path: plot_loss_curves({}, path), "curves is empty, expected at least one"),
        (lambda path: plot_loss_curves({"a": [(0, math.nan)]}, path), "curve 'a' has no finite value"),
        (lambda path: plot_bars({}, path), "groups is empty, expected"),
        (lambda path: plot_verdict({}, path), "figures is empty, expected"),
        (lambda path: plot_bars({"a": {"x": 1}, "b": {}}, path), r"group 'b' has the series \[\], expected \['x'\]"),
        (lambda path: plot_bars({"a": {"x": -math.inf}}, path), "'x' of group 'a' is -inf, expected a finite number"),
    ],
)
def test_a_bad_plot_is_refused_and_leaves_no_file(plot: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        plot(tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_the_error_without_a_package_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package, plot in (("scikit-learn", drawn_deltas), ("matplotlib", lambda path: plot_bars(BARS, path))):
        monkeypatch.setitem(sys.modules, package.replace("scikit-", "sk"), None)
        with pytest.raises(ImportError, match=rf"plots need {package}, pip install 'qwen-functional\[plots\]'"):
            plot(tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
