"""Progress bars, on stderr."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

IN_A_LOG = 10.0  # seconds between two lines


def progress_bar(*arguments: Any, **options: Any) -> tqdm:
    """A bar with tqdm's arguments; if stderr is not a terminal, such as a job's log, it writes a line now and then."""
    return tqdm(*arguments, mininterval=0.1 if sys.stderr.isatty() else IN_A_LOG, **options)
