"""The Triton path on a GPU, through the public functions alone. Deselected by default: pytest -m gpu."""
