"""The fused Triton path. Nothing here is imported before a kernel is to serve."""
