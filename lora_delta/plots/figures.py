"""How every figure here is drawn: style, size, text, and a PNG file that is written atomically.

It needs matplotlib, ``pip install 'qwen-functional[plots]'``. Nothing here touches pyplot or its state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import replaces

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, https://jfly.uni-koeln.de/color, without yellow, which is faint on white, and with grey
# instead of black. With seven colours and twelve markers, 84 classes differ from each other.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#4D4D4D")
_DPI = 150
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.6,
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    "axes.labelcolor": "#333333",
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E8E8E8",
    "grid.linewidth": 0.6,
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 9),
    **dict.fromkeys(("xtick.color", "ytick.color"), "#555555"),
    **dict.fromkeys(("xtick.major.width", "ytick.major.width"), 0.6),
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "auto",
    "savefig.bbox": "standard",  # "tight" would change the size in pixels
}


def require_matplotlib() -> Any:
    """The package, with the modules used here; raises :class:`ImportError`, which says what to install."""
    try:
        import matplotlib
        import matplotlib.backends.backend_agg
        import matplotlib.figure
    except ImportError as error:
        raise _to_install("matplotlib", error) from error
    return matplotlib


def require_sklearn() -> Any:
    """scikit-learn, likewise."""
    try:
        import sklearn.decomposition
        import sklearn.metrics
    except ImportError as error:
        raise _to_install("scikit-learn", error) from error
    return sklearn


def _to_install(package: str, error: ImportError) -> ImportError:
    return ImportError(f"plots need {package}, pip install 'qwen-functional[plots]': {error}")


def style() -> AbstractContextManager[None]:
    """The context in which figures are made, drawn and written: matplotlib makes some parts only when it writes."""
    return require_matplotlib().rc_context(_STYLE)


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of a given size in inches, to the nearest pixel: releases of matplotlib round differently."""
    matplotlib = require_matplotlib()
    whole = round(width * _DPI) / _DPI, round(height * _DPI) / _DPI
    figure = matplotlib.figure.Figure(figsize=whole, dpi=_DPI, layout="constrained")
    matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
    return figure


def check_png(path: str | Path) -> None:
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"path is {str(path)!r}, expected the name of a .png file")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write the figure next to the path and rename it, so the file is whole or absent."""
    with style(), replaces(path) as unfinished:
        figure.savefig(unfinished, format="png", dpi=_DPI)


def decimals(values: Sequence[float]) -> str:
    """A format that shows the largest of the values with two or three digits, and the others alike."""
    largest = max((abs(value) for value in values if not math.isnan(value)), default=0) or 1
    magnitude = math.floor(math.log10(largest))
    return f".{max(0, 2 - magnitude - (magnitude < 0))}f" if -4 < magnitude < 6 else ".2g"


def plain_text(value: object, width: int = 32) -> str:
    """Text that matplotlib shows unchanged: no formulas between dollars, and no leading _, which legends leave out."""
    text = " ".join(str(value).split())
    text = text if len(text) <= width else text[: width - 1] + "…"
    return (" " + text if text.startswith("_") else text).replace("$", r"\$")
