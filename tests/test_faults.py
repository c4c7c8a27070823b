"""A few trials of ``faults.py``: kill -9, signals, failing disks, second writers, power cuts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

COMMANDS = ("label", "train", "train on texts", "generate", "teach", "evaluate")
TIMES = 2


@pytest.fixture(scope="module")
def counts() -> dict[str, Any]:
    """{scenario and command: [how often what happened, what was wrong]}, from the script, in its own processes."""
    script = Path(__file__).parent / "faults.py"
    done = subprocess.run([sys.executable, script, "--json", "--times", str(TIMES)], capture_output=True, text=True)
    assert done.stdout, done.stderr
    return json.loads(done.stdout)


def _nothing_wrong(counts: dict[str, Any], scenario: str, command: str) -> None:
    happened, wrong = counts[f"{scenario} {command}"]
    assert not wrong
    assert sum(happened.values()) == TIMES


@pytest.mark.parametrize("command", COMMANDS)
def test_what_was_killed_goes_on_to_the_bits_of_an_undisturbed_one_and_leaves_no_litter(
    command: str, counts: dict[str, Any]
) -> None:
    _nothing_wrong(counts, "kill", command)


@pytest.mark.parametrize("command", COMMANDS)
def test_signals_end_a_command_with_130_or_143_and_what_it_did_is_saved(command: str, counts: dict[str, Any]) -> None:
    _nothing_wrong(counts, "interrupt", command)


@pytest.mark.parametrize("scenario", ["failing disk", "full disk"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_disk_that_fails_or_is_full_is_said_in_a_line_and_nothing_is_lost(
    scenario: str, command: str, counts: dict[str, Any]
) -> None:
    _nothing_wrong(counts, scenario, command)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_second_writer_is_refused_and_the_first_one_is_unharmed(command: str, counts: dict[str, Any]) -> None:
    _nothing_wrong(counts, "two writers", command)


@pytest.mark.parametrize("command", COMMANDS)
def test_empty_half_or_missing_files_are_mended_or_named(command: str, counts: dict[str, Any]) -> None:
    _nothing_wrong(counts, "power cut", command)
