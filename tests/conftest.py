import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton: its interpreter runs the kernels

from devices import DEVICES
from ranks import Ranks

torch.set_num_threads(1)  # the models here are tiny: a second thread costs more than it saves


@pytest.fixture(autouse=True)
def one_thread_when_a_test_ends() -> Iterator[None]:
    """Sums depend on the number of threads: one that a test leaves behind would fail others, to the bit."""
    yield
    left = torch.get_num_threads()
    torch.set_num_threads(1)  # or every later test would fail as well
    assert left == 1, "the test has changed the number of threads of this process"


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each available device."""
    return request.param


@pytest.fixture
def real_checkpoint() -> Iterator[str]:
    """Folder or hub id of a real Qwen2 checkpoint, from the environment. Only its tests run on two threads."""
    model = os.environ.get("QWEN_FUNCTIONAL_CHECKPOINT")
    if not model:
        pytest.skip("QWEN_FUNCTIONAL_CHECKPOINT is not set: no test ran on real weights")
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, os.cpu_count() or 1))
    yield model
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two processes in one group; they stay usable when a rank fails outside a collective."""
    ranks = Ranks(2)
    yield ranks
    ranks.stop()
