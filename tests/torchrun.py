"""Commands under torchrun."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping


def torchrun(n: int, *arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script or ``-m module`` in ``n`` processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
