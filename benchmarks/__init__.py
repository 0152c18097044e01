import os

os.environ.setdefault(
    "KINETO_LOG_LEVEL", "6"
)  # PyTorch's profiler writes to stderr otherwise; read when torch is imported
