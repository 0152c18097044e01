import pytest
import timm
from torch import nn


@pytest.fixture
def net() -> nn.Module:
    """An EfficientNet with two SE blocks, blocks.3.0.se and blocks.4.0.se."""
    return timm.create_model("test_efficientnet").eval()
