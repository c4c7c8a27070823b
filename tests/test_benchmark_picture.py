"""Pictures of benchmarks show the record's numbers, in labels that can be read. Records are made by hand."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import picture
import pytest
import report
import throughput
from test_plots import size

from lora_delta.plots.figures import save_figure

ROOT = Path(__file__).resolve().parents[1]

pytest.importorskip("matplotlib")

WAYS = ("engine", "engine-block", "seed", "hooks-one", "hooks-batch")
MACHINE = {
    "gpu": None,
    "cpu": "Intel(R) Xeon(R) Platinum 8480+ CPU @ 2.00GHz",
    "cpus": 2,
    "threads": 2,
    "cpu_capability": "AVX512",
    "torch": "2.13.0+cpu",
}


def run(dtype: str, rates: dict[str, float], floor: float, **engine: Any) -> dict[str, Any]:
    """One dtype of 8 adapters and 158 tokens; ``floor`` in tokens per second."""
    ways: dict[str, dict[str, Any]] = {
        way: {"tokens_per_second": rate, "adapters_timed": 2 if way == "seed" else 8} for way, rate in rates.items()
    }
    ways.get("engine", {}).update(engine)
    texts = {"kind": "generic probes", "count": 5, "tokens": 158, "tree_tokens": 155, "longest": 33}
    seconds = {"seconds": {"median": 8 * 158 / floor}}
    return {"dtype": dtype, "adapters": 8, "texts": texts, "floor": seconds, "ways": ways}


BFLOAT16 = run("bfloat16", dict(zip(WAYS, (445.0, 297.0, 30.0, 214.0, 278.0), strict=True)), 1140.0)
FLOAT32 = run("float32", dict(zip(WAYS, (154.0, 121.0, 14.0, 120.0, 147.0), strict=True)), 210.0)
FLOAT16 = run("float16", {"engine": 151.0, "engine-block": 119.0}, 160.0, compute="float32")
ALONE = run("float32", {"engine": 0.0123}, 0.0124)
FLOOR_ALONE = run("float16", {}, 160.0)

RUNS: dict[str, list[dict[str, Any]]] = {
    "one dtype": [BFLOAT16],
    "two dtypes": [BFLOAT16, FLOAT32],
    "three dtypes": [BFLOAT16, FLOAT32, FLOAT16],
    "one way": [ALONE],
    "the floor alone": [FLOOR_ALONE],
}


def measured(*runs: dict[str, Any], model: str = "Qwen2.5-0.5B-Instruct") -> dict[str, Any]:
    """A record of throughput.py, as far as it is drawn."""
    return {"machine": MACHINE, "model": model, "loss": "delta", "rank": 16, "runs": list(runs)}


def point(adapters: int, per_pass: int | None = None, probes: int = 5, tree_tokens: int = 155) -> dict[str, Any]:
    seconds = 0.02 + 0.0021 * tree_tokens * adapters * (1.1 if per_pass else 1)
    return {
        "adapters": adapters,
        "per_pass": per_pass,
        "probes": probes,
        "tree_tokens": tree_tokens,
        "seconds": {"median": seconds, "min": 0.9 * seconds, "max": 1.2 * seconds},
        "seconds_per_adapter": seconds / adapters,
        "seconds_per_token": seconds / adapters / tree_tokens,
        "step_bytes": 2e8 + tree_tokens * min(per_pass or adapters, adapters) * 1.2e6 + adapters * 18e6,
        "gradient_bytes": adapters * 17.6e6,
    }


ONE_PASS: dict[str, Any] = {"name": "adapters", "points": [point(n) for n in (1, 2, 4, 8, 16, 32)]}
PASSES: dict[str, Any] = {"name": "adapters in passes of 8", "points": [point(n, 8) for n in (8, 16, 32, 64)]}
MORE_PROBES: dict[str, Any] = {
    "name": "probes",
    "points": [point(4, None, count, tokens) for count, tokens in ((5, 155), (15, 352), (30, 700), (60, 1390))],
}
SERIES: dict[str, list[dict[str, Any]]] = {
    "all": [ONE_PASS, PASSES, MORE_PROBES],
    "adapters": [ONE_PASS, {"name": "adapters in passes of 8", "points": []}, {"name": "probes", "points": []}],
    "probes": [MORE_PROBES],
    "one point each": [{**series, "points": series["points"][-1:]} for series in (ONE_PASS, PASSES, MORE_PROBES)],
    "counts side by side": [{"name": "adapters", "points": [point(n) for n in (1, 2, 3, 15, 16, 17, 63, 64, 1000)]}],
}


def scaled(*series: dict[str, Any]) -> dict[str, Any]:
    """A record of scaling.py, as far as it is drawn."""
    names = {"model": "random weights of size 0.5b", "rank": 16, "dtype": "bfloat16", "way": "engine"}
    return {**names, "machine": MACHINE, "series": list(series)}


Figure = Any  # matplotlib's
FIGURES: dict[str, Callable[[], Figure]] = {
    **{name: partial(picture.throughput_figure, measured(*runs)) for name, runs in RUNS.items()},
    "a long name": partial(picture.throughput_figure, measured(BFLOAT16, model="_$a/model$_" * 30)),
    **{f"series: {name}": partial(picture.scaling_figure, scaled(*series)) for name, series in SERIES.items()},
}


def texts(figure: Figure) -> list[Any]:
    """Every text that is drawn, once the layout is settled."""
    from matplotlib.text import Text

    with picture.style():
        figure.draw_without_rendering()
    off = {
        label
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
        for label in (tick.label1, tick.label2)
    }
    return [
        text
        for text in figure.findobj(Text)
        if text not in off and text.get_visible() and text.get_text() and text.get_window_extent().width > 0
    ]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FIGURES)
def test_labels_lie_in_the_figure_and_hide_none_another(name: str) -> None:
    from matplotlib.text import Text

    figure = FIGURES[name]()
    drawn = texts(figure)
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in drawn]
    assert len(boxes) >= 5
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
    assert [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)] == []


@pytest.mark.parametrize("name", RUNS)
def test_bars_and_the_floor_are_those_of_the_record(name: str) -> None:
    figure: Figure = picture.throughput_figure(measured(*RUNS[name]))
    assert len(figure.axes) == len(RUNS[name])
    shown = [text.get_text() for text in texts(figure)]
    assert "Qwen2.5-0.5B-Instruct, delta, rank 16" in shown
    assert any(text.startswith(f"{MACHINE['cpu']} (AVX512), 2 threads on 2 CPUs") for text in shown)
    for axes, run in zip(figure.axes, RUNS[name], strict=True):
        ways = run["ways"]
        assert [bar.get_x() for bar in axes.patches] == [0] * len(ways)
        assert [bar.get_width() for bar in axes.patches] == [way["tokens_per_second"] for way in ways.values()]
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names == [way + "*" * (way == "seed") for way in ways]
        floor = 8 * 158 / run["floor"]["seconds"]["median"]
        (line,) = axes.lines
        assert list(line.get_xdata()) == pytest.approx([floor, floor])
        heights = [axes.transData.transform((0, bar.get_y() + bar.get_height() / 2))[1] for bar in axes.patches]
        assert heights == sorted(heights, reverse=True), "the record's first way is not on top"
        left, right = axes.get_xlim()
        assert left == 0
        assert right > max([floor, *(way["tokens_per_second"] for way in ways.values())])
        assert len({bar.get_facecolor() for bar in axes.patches if bar.get_y() < 1.5}) == min(len(ways), 1)
        assert axes.get_title("left") == f"{run['dtype']}, G = 8, 5 generic probes"


def test_values_stand_at_the_ends_of_their_bars() -> None:
    figure: Figure = picture.throughput_figure(measured(BFLOAT16, FLOAT16))
    drawn = texts(figure)
    axes = figure.axes[0]
    for bar, value in zip(axes.patches, ("445", "297", "30", "214", "278"), strict=True):
        (label,) = [text for text in drawn if text.get_text() == value and text.axes is axes]
        box, end = label.get_window_extent(), bar.get_window_extent()
        assert 0 < box.x0 - end.x1 < 15
        assert end.y0 < (box.y0 + box.y1) / 2 < end.y1
    shown = [text.get_text() for text in drawn]
    assert {"floor 1140", "floor 160"} <= set(shown)
    assert any("* timed on 2 adapters, scaled" in text for text in shown)
    ours, rivals = ({bar.get_facecolor() for bar in bars} for bars in (axes.patches[:2], axes.patches[2:]))
    assert len(ours) == len(rivals) == 1
    assert ours != rivals


def test_curves_are_those_of_the_record() -> None:
    figure: Figure = picture.scaling_figure(scaled(*SERIES["all"]))
    panels = figure.axes
    cases = [(panels[:2], [ONE_PASS, PASSES], "adapters", "seconds_per_adapter", 1e3)]
    cases += [(panels[2:], [MORE_PROBES], "tree_tokens", "seconds_per_token", 1e6)]
    for (left, right), family, x, key, factor in cases:
        assert left.get_ylim()[0] == right.get_ylim()[0] == 0
        *curves, gradients = right.lines
        for container, curve, series in zip(left.containers, curves, family, strict=True):
            points = series["points"]
            line, _, (bars,) = container.lines
            times = [factor * point[key] for point in points]
            assert list(line.get_xdata()) == list(curve.get_xdata()) == [point[x] for point in points]
            assert list(line.get_ydata()) == pytest.approx(times)
            ends = [(low, high) for (_, low), (_, high) in bars.get_segments()]
            assert [low for low, _ in ends] == pytest.approx([0.9 * time for time in times])
            assert [high for _, high in ends] == pytest.approx([1.2 * time for time in times])
            assert list(curve.get_ydata()) == pytest.approx([point["step_bytes"] / 1e9 for point in points])
        held = {point[x]: point["gradient_bytes"] / 1e9 for series in family for point in series["points"]}
        assert dict(zip(*gradients.get_data(), strict=True)) == pytest.approx(held)
    assert panels[0].get_xscale() == "log"
    assert [label.get_text() for label in panels[0].get_xticklabels()] == ["1", "2", "4", "8", "16", "32", "64"]
    labels = [[text.get_text() for text in axes.get_legend().get_texts()] for axes in panels]
    held_label = "the gradients in it"
    top = ["in one pass", "in passes of 8"]
    assert labels == [top, [*top, held_label], ["G = 4"], ["G = 4", held_label]]


@pytest.mark.parametrize(("name", "panels"), [("all", 4), ("adapters", 2), ("probes", 2), ("one point each", 4)])
def test_series_without_points_are_not_drawn(name: str, panels: int) -> None:
    figure: Figure = picture.scaling_figure(scaled(*SERIES[name]))
    assert len(figure.axes) == panels


def test_no_points_at_all_are_an_error() -> None:
    with pytest.raises(ValueError, match="record has no points"):
        picture.scaling_figure(scaled({"name": "adapters", "points": []}))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("figure_of", "record", "pixels"),
    [
        (picture.throughput_figure, measured(BFLOAT16), (1200, 510)),
        (picture.throughput_figure, measured(BFLOAT16, FLOAT32), (1440, 510)),
        (picture.scaling_figure, scaled(*SERIES["all"]), (1500, 1020)),
        (picture.scaling_figure, scaled(*SERIES["probes"]), (1500, 585)),
    ],
)
def test_a_picture_is_written_whole_or_not_at_all(
    figure_of: Callable[[Any], Figure],
    record: dict[str, Any],
    pixels: tuple[int, int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from matplotlib.figure import Figure

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it fails
    path = tmp_path / "plot.png"
    save_figure(figure_of(json.loads(json.dumps(record))), path)
    assert size(path) == pixels
    before = path.read_bytes()
    assert len(before) > 10_000

    def savefig(_: Any, file: Path, **__: Any) -> None:
        file.write_bytes(b"half a picture")
        raise OSError("the disk is full")

    monkeypatch.setattr(Figure, "savefig", savefig)
    with pytest.raises(OSError, match="the disk is full"):
        save_figure(figure_of(record), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plot.pdf", "plot.pdf', expected the name of a .png file"),
        ("plot", "plot', expected the name of a .png file"),
        ("nowhere/plot.png", "nowhere/plot.png, expected a file in a folder that exists"),
        ("folder.png", "folder.png, expected a file in a folder that exists"),
    ],
)
def test_a_plot_that_cannot_be_written_ends_the_program(
    name: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit, match="2"):
        throughput.arguments(["--plot", str(tmp_path / name)])
    error = capsys.readouterr().err
    assert "error: --plot" in error
    assert message in error


def test_without_matplotlib_only_a_plot_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert throughput.arguments([]).plot is None
    with pytest.raises(SystemExit, match="2"):
        throughput.arguments(["--plot", str(tmp_path / "plot.png")])
    assert "plots need matplotlib, pip install 'qwen-functional[plots]'" in capsys.readouterr().err


def test_the_scripts_do_not_import_matplotlib_by_themselves() -> None:
    code = "import sys, throughput; throughput.arguments([]); assert 'matplotlib' not in sys.modules"
    search = [str(ROOT / "benchmarks"), str(ROOT)]
    code = f"import sys; sys.path[:0] = {search!r}; {code}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_a_run_is_drawn_after_its_json_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = measured(BFLOAT16)

    def record_of(options: Any, keep: Callable[[Any], None]) -> Any:
        keep(record)
        return record

    json_path, plot = tmp_path / "result.json", tmp_path / "plot.png"
    drawn = []

    def save(record: Any, path: Path) -> None:
        assert json.loads(json_path.read_text()) == record
        drawn.append((record, path))

    monkeypatch.setattr(throughput, "record_of", record_of)
    monkeypatch.setattr(throughput, "throughput_figure", lambda record: record)
    monkeypatch.setattr(report, "save_figure", save)
    monkeypatch.setattr(throughput, "set_threads", lambda threads: None)
    assert throughput.main(["--json", str(json_path), "--plot", str(plot)]) == 0
    assert drawn == [(record, plot)]
    assert throughput.main(["--json", str(json_path)]) == 0
    assert len(drawn) == 1
