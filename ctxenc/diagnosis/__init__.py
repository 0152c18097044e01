"""Check the fused kernels on this machine for `ctxenc doctor`, each in a process of its own."""
