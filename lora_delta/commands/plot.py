"""``lora-delta plot``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qwen_functional.files import read_json_object


def add(subcommands: argparse._SubParsersAction) -> None:
    """Register the subcommand."""
    plot = subcommands.add_parser(
        "plot",
        help="plot the deltas of a label folder in two dimensions",
        description="Plots the deltas of a label folder in their first two principal components; with classes, "
        "coloured by class and with the silhouette score.",
    )
    plot.add_argument("labels", type=Path, metavar="DELTAS", help="folder written by lora-delta label")
    plot.add_argument("--classes", type=Path, metavar="FILE", help="JSON object {adapter's name or source: class}")
    plot.add_argument("--out", type=Path, metavar="FILE", help="a .png file (default: DELTAS/deltas.png)")
    plot.add_argument("--json", action="store_true", help="print what was drawn as JSON")
    plot.set_defaults(run=_plot)


def _plot(options: argparse.Namespace) -> int:
    from ..labelling.table import DeltaLabels
    from ..plots.charts import plot_deltas, silhouette_score

    labels = DeltaLabels(options.labels)
    classes = None
    if options.classes is not None:
        classes = _classes(options.classes, labels.names)
    deltas = labels.tensor.flatten(1)
    out = options.out or options.labels / "deltas.png"
    plot_deltas(deltas, classes, None if len(labels) > 60 else [Path(name).name for name in labels.names], path=out)
    measured = classes is not None and 2 <= len(set(classes)) < len(classes)
    score = silhouette_score(deltas, classes) if classes is not None and measured else None
    if options.json:
        print(json.dumps({"picture": str(out), "adapters": len(labels), "silhouette_score": score}))
    else:
        print(f"{len(labels)} deltas in {out}" + ("" if score is None else f", silhouette score {score:.3f}"))
    return 0


def _classes(path: Path, names: list[str]) -> list[str]:
    classes = read_json_object(path, "a JSON object {adapter's name or source: class}")
    missing = [name for name in names if name not in classes]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"--classes lacks {missing[0]!r}{more}, expected a class for each adapter")
    return [str(classes[name]) for name in names]
