"""Hold the operators: specification, PyTorch path, and Triton kernels in fused/. ctxenc.functional chooses between the last two."""
