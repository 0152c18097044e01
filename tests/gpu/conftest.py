import pytest
import torch


@pytest.fixture(autouse=True)
def memory_goes_back():
    """Tests run side by side on one GPU (pytest -n), and some fill much of it."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
