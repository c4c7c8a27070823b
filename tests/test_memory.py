"""Free memory is what the system and its control groups (v1 or v2) leave; page cache does not count as used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from qwen_functional.memory import cgroup_bytes, free_bytes

MIB = 1 << 20
V1_NO_LIMIT = 9223372036854771712


def write(root: Path, files: dict[str, str | int]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{text}\n")
    return root


def v2(group: str, limit: str | int, used: int, cached: int | None = None) -> dict[str, str | int]:
    files: dict[str, str | int] = {f"{group}/memory.max": limit, f"{group}/memory.current": used}
    stat = f"anon 5\nfile 9\ninactive_file {cached}\nactive_file 1"
    return files if cached is None else {**files, f"{group}/memory.stat": stat}


def v1(group: str, limit: int, used: int, cached: int) -> dict[str, str | int]:
    stat = f"inactive_file 7\nhierarchical_memory_limit 3\ntotal_inactive_file {cached}\ntotal_active_file 1"
    files: dict[str, str | int] = {"limit_in_bytes": limit, "usage_in_bytes": used, "stat": stat}
    return {f"{group}/memory.{name}": value for name, value in files.items()}


SYS = "sys/fs/cgroup"
CASES: dict[str, tuple[str, dict[str, str | int], int | None]] = {
    "v2": ("0::/", v2(SYS, 100 * MIB, 60 * MIB), 40 * MIB),
    "v2 with cached pages": ("0::/", v2(SYS, 100 * MIB, 60 * MIB, 25 * MIB), 65 * MIB),
    "v2 without a limit": ("0::/", v2(SYS, "max", 60 * MIB, 0), None),
    "v2, a group of its own": (
        "0::/user.slice/run:1",
        {**v2(f"{SYS}/user.slice/run:1", 50 * MIB, 20 * MIB, 10 * MIB), **v2(f"{SYS}/user.slice", "max", 90 * MIB)},
        40 * MIB,
    ),
    "v2, the limit of the group above": (
        "0::/pod/container",
        {**v2(f"{SYS}/pod/container", 90 * MIB, 20 * MIB), **v2(f"{SYS}/pod", 100 * MIB, 95 * MIB, 2 * MIB)},
        7 * MIB,
    ),
    "v2, the host's name of the group": ("0::/docker/1234", v2(SYS, 100 * MIB, 60 * MIB, 0), 40 * MIB),
    "v2, more used than the limit": ("0::/", v2(SYS, 100, 600, 5), 0),
    "v1": (
        "4:cpu,memory:/jobs/7\n0::/",
        {**v1(f"{SYS}/memory/jobs/7", 80 * MIB, 50 * MIB, 15 * MIB), **v1(f"{SYS}/memory", V1_NO_LIMIT, 900 * MIB, 0)},
        45 * MIB,
    ),
    "v1, the host's name of the group": (
        "5:pids:/docker/1\n4:memory:/docker/1",
        v1(f"{SYS}/memory", 80 * MIB, 50 * MIB, 15 * MIB),
        45 * MIB,
    ),
    "v1 beside v2": (
        "4:memory:/\n0::/",
        {**v1(f"{SYS}/memory", 80 * MIB, 50 * MIB, 0), **v2(f"{SYS}/unified", 70 * MIB, 50 * MIB)},
        20 * MIB,
    ),
    "other controllers": ("4:memory_recursive:/\n3:cpu:/", v1(f"{SYS}/memory", 80 * MIB, 50 * MIB, 0), None),
    "no files": ("0::/a\n4:memory:/b", {}, None),
    "files that hold something else": ("0::/", v2(SYS, "soon", 1, 1), None),
}


@pytest.mark.parametrize("case", CASES)
def test_what_a_control_group_leaves_is_its_limit_less_what_cannot_be_taken_back(tmp_path: Path, case: str) -> None:
    lines, files, expected = CASES[case]
    left = cgroup_bytes(write(tmp_path, {"proc/self/cgroup": lines, **files}))
    assert left == expected if expected is not None else left > 1 << 60


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert cgroup_bytes(tmp_path) > 1 << 60


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
def test_free_memory_is_no_more_than_the_system_has() -> None:
    free = free_bytes(torch.device("cpu"))
    assert 0 < free < psutil.virtual_memory().total + psutil.Process().memory_info().rss


@pytest.mark.parametrize(("given", "left"), [(None, "None"), ("0", "0")])
def test_huge_pages_are_asked_for_in_this_process_alone_unless_the_user_says_otherwise(
    given: str | None, left: str
) -> None:
    code = "import os; from qwen_functional.memory import use_huge_pages; use_huge_pages(); "
    code += "print(os.environ.get('THP_MEM_ALLOC_ENABLE'))"
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    environment |= {} if given is None else {"THP_MEM_ALLOC_ENABLE": given}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == left
