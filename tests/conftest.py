import os
from collections.abc import Iterator
from typing import Any

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


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    """Of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
