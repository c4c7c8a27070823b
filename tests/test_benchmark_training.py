"""The benchmark of a training step: every loss has a row, and what is not the engine's is the rest of the step."""

from __future__ import annotations

import re
import sys

import pytest
import training_step


def test_a_run_prints_a_row_for_each_loss(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--size", "tiny", "--rank", "4", "--chunk-width", "8", "--steps", "2", "--threads", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["training_step.py", *given])
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")
    assert training_step.main() == 0
    row = re.compile(r"^\| ([a-z+]+) \| .* \| ([\d.]+) \| ([\d.]+) \| (\d+)% \|$", re.MULTILINE)
    rows = row.findall(capsys.readouterr().out)
    assert [name for name, *_ in rows] == list(training_step.LOSSES)
    for name, whole, engine, share in rows:
        assert float(engine) <= float(whole)
        assert (share == "100") == (name == "weights")
