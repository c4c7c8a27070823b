"""Bars: how often they are drawn, on a terminal and in a log."""

from __future__ import annotations

import io
import sys
import time

import pytest

from lora_delta import progress


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_a_log_gets_the_bars_first_and_last_line_and_a_terminal_more(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = Screen() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    for number in (bar := progress.progress_bar(range(60), "work")):
        time.sleep(0.01)
        bar.set_postfix(number=number, refresh=False)
    lines = [line for line in written.getvalue().split("\r") if line.strip()]
    assert "0/60" in lines[0]
    assert "60/60" in lines[-1]
    assert "number=59" in lines[-1]
    assert len(lines) > 3 if terminal else len(lines) == 2
