import os

import pytest
import timm
import torch
from hypothesis import settings
from torch import nn

settings.register_profile("nightly", max_examples=10_000)  # see tests/draws.py

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Each would take every core: two workers of two threads on two cores need ten times the processor time.
    threads = max(1, (os.cpu_count() or 1) // workers)
    torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))


@pytest.fixture
def net() -> nn.Module:
    """An EfficientNet with two SE blocks, blocks.3.0.se and blocks.4.0.se."""
    return timm.create_model("test_efficientnet").eval()
