"""What the fused kernels do on this machine: needs timm for a model's own shapes."""
