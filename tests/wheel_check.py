"""Run by .ci/run in an environment that holds the built wheel and what it depends on, outside the source tree."""

import importlib.util
from pathlib import Path

import torch

import ctxenc

assert "site-packages" in ctxenc.__file__, ctxenc.__file__
assert (Path(ctxenc.__file__).parent / "py.typed").exists()
assert all(importlib.util.find_spec(name) is None for name in ("timm", "torchvision")), "the core must need torch alone"
x = torch.randn(2, 32, 7, 7, requires_grad=True)
block = ctxenc.ContextEncoding(32)
block(x).sum().backward()
assert x.grad is not None
assert torch.isfinite(x.grad).all()
print(f"ctxenc {ctxenc.__version__} works from its wheel with torch {torch.__version__} alone: {ctxenc.backend_info()}")
