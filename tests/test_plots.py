"""Pictures are written whole and in their size; the measures behind them against scikit-learn's."""

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

from lora_delta.plots import plot_bars, plot_deltas, plot_loss_curves, project_2d, silhouette_score

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
def test_the_projection_is_another_than_scikit_learns_pca(shape: tuple[int, int], dtype: torch.dtype) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    points = 3 + torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    pca = decomposition.PCA(2, svd_solver="full")
    expected = torch.as_tensor(pca.fit_transform(points.double().numpy()))
    projected, explained = project_2d(points)
    assert projected.dtype == torch.float64
    signs = torch.sign((projected * expected).sum(0))
    torch.testing.assert_close(projected * signs, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(explained, torch.as_tensor(pca.explained_variance_ratio_), rtol=0, atol=1e-9)


def test_the_signs_of_a_projection_depend_on_the_order_of_the_deltas() -> None:
    points, _ = deltas()
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(project_2d(points[order])[0], project_2d(points)[0][order])


def test_equal_deltas_have_a_projection_that_is_not_zero() -> None:
    points, explained = project_2d(torch.ones(4, 3))
    assert not points.any()
    assert not explained.any()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("n_classes", [2, 8, 39])
def test_the_silhouette_is_another_than_scikit_learns(metric: str, n_classes: int) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    points, classes = deltas(n_classes=n_classes)
    points[3] = points[3 + n_classes] if n_classes < 10 else 0  # two that are equal, or one without a direction
    expected = metrics.silhouette_score(points.double().numpy(), classes, metric=metric)
    assert silhouette_score(points, classes, metric) == pytest.approx(expected, abs=1e-9)
    numbers = torch.tensor([int(name.removeprefix("task ")) for name in classes])
    assert silhouette_score(points, numbers, metric) == silhouette_score(points, classes, metric)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_one_alone_in_its_class_or_equal_points_spoil_the_silhouette(metric: str) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    points, classes = torch.ones(5, 3, dtype=torch.float64), ["a", "a", "b", "b", "c"]
    assert silhouette_score(points, classes, metric) == 0
    points[:3] = torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = metrics.silhouette_score(points.numpy(), classes, metric=metric)
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
def test_bad_points_are_accepted(compute: Callable[[], Any], message: str) -> None:
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
    "many bars": (
        lambda path: plot_bars({f"a long name {i}": {str(j): i - j for j in range(9)} for i in range(9)}, path),
        (1200, 675),
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_not_written_or_of_another_size_or_not_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it fails
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


def test_a_plot_that_fails_spoils_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_the_title_shows_no_silhouette_or_that_of_the_projection(
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


def test_labels_hide_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    text = pytest.importorskip("matplotlib.text")
    savefig = figure_module.Figure.savefig
    boxes: list[Any] = []

    def measured(figure: Any, *arguments: Any, **options: Any) -> None:
        savefig(figure, *arguments, **options)
        boxes.extend(text.Text.get_window_extent(note) for note in figure.axes[0].texts)

    monkeypatch.setattr(figure_module.Figure, "savefig", measured)
    drawn_deltas(tmp_path / "plot.png", classes=[f"task {i % 20}" for i in range(40)])
    assert len(boxes) == 20
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]


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
        (lambda path: plot_bars({"a": {"x": 1}, "b": {}}, path), r"group 'b' has the series \[\], expected \['x'\]"),
        (lambda path: plot_bars({"a": {"x": -math.inf}}, path), "'x' of group 'a' is -inf, expected a finite number"),
    ],
)
def test_a_bad_plot_is_accepted_or_leaves_a_file(plot: Callable[[Path], Path], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        plot(tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_the_error_without_matplotlib_names_no_way_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plots need matplotlib, pip install 'qwen-functional\[plots\]'"):
        plot_bars(BARS, tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())
