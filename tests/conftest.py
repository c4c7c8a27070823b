import os

import pytest
import torch

torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def real_checkpoint() -> str:
    """Folder or hub id of a real Qwen2 checkpoint, from the environment."""
    model = os.environ.get("QWEN_FUNCTIONAL_CHECKPOINT")
    if not model:
        pytest.skip("QWEN_FUNCTIONAL_CHECKPOINT is not set: no test ran on real weights")
    return model
