import pytest
import timm
from hypothesis import settings
from torch import nn

settings.register_profile("nightly", max_examples=10_000)  # see tests/draws.py


@pytest.fixture
def net() -> nn.Module:
    """An EfficientNet with two SE blocks, blocks.3.0.se and blocks.4.0.se."""
    return timm.create_model("test_efficientnet").eval()
