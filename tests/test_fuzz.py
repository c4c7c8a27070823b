"""A sample of the random inputs of ``fuzz.py``, and a check that its bench notices bad doors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from bad_doors import BAD
from doors import KINDS

from lora_delta.cli import main
from lora_delta.embedded import embedded_checkpoint

SAMPLE = 300


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    """The outcomes of the sample and of the bad doors, which the script opens in its own processes."""
    script = Path(__file__).parent / "fuzz.py"
    options = ["--json", "--bad-doors", "--jobs", "2", "--count", str(SAMPLE), "--template-seconds", "1"]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def test_every_drawn_input_is_taken_or_refused_in_one_line_soon_and_nothing_else_happens(
    answers: list[dict[str, Any]],
) -> None:
    drawn = [answer for answer in answers if answer["kind"] in KINDS]
    others = [answer for answer in drawn if answer["what"] not in ("succeeded", "refused")]
    assert not others, f"{len(others)} of {len(drawn)}, of them {others[:3]}"
    assert len(drawn) >= SAMPLE - 10
    assert {answer["kind"] for answer in drawn} == set(KINDS)
    for end in ("succeeded", "refused"):
        assert sum(answer["what"] == end for answer in drawn) > SAMPLE // 10, end


@pytest.mark.parametrize(("door", "what"), BAD.items(), ids=lambda value: getattr(value, "__name__", value))
def test_the_bench_sees_a_door_that_does_what_none_may(door: Any, what: str, answers: list[dict[str, Any]]) -> None:
    assert [answer["what"] for answer in answers if answer["kind"] == door.__name__] == [what]


def test_a_refusal_is_a_line_of_some_length_that_moves_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    for given in ("absent\x1b[2J\u202e\ud800", "/".join(["\x1b[2J", *"7" * 100_000])):
        assert main(["label", "--model", str(embedded_checkpoint()), "--out", "out", given]) == 2
        line = capsys.readouterr().err
        assert line.startswith("lora-delta label: ")
        assert r"\x1b[2J" in line
        assert line[:-1].isprintable()
        assert len(line) < 3000
