"""Checks of the fused kernels on this machine, each in a process of its own: what `ctxenc doctor` runs."""
