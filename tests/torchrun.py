"""Commands under torchrun."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping

# What a process of torch 2.13 may end with once all is done: a thread of gloo that outlives its group.
_RACE_AT_EXIT = "terminate called without an active exception"


def torchrun(n: int, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script or ``-m module`` in n processes; again where they ended in that race."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *arguments]
    for _ in range(4):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
        if done.returncode == 0 or _RACE_AT_EXIT not in done.stderr:
            break
    return done
