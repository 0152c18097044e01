"""The Triton kernels on CPU tensors: collected only with TRITON_INTERPRET=1, which tests/test_interpreter.py sets for a process."""
