"""A child process of `ctxenc doctor` in which each kernel fails in the way that it is named after."""

import os
import signal
import time

import torch

from ctxenc.diagnosis import tasks
from ctxenc.kernels.verdicts import Kind, Operator

NAMES = ("healthy", "wrong", "random", "raising", "killed", "sleeping", "leaving")
calls = 0


def kernel_of(name):
    def kernel(x):
        global calls
        calls += 1
        if name == "raising":
            raise RuntimeError("no such\ninstruction")
        if name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if name == "sleeping":
            time.sleep(600)
        if name == "leaving":
            os._exit(3)
        return 2 * x + {"wrong": 1.0, "random": 1e-7 * calls}.get(name, 0.0)

    return kernel


def excess(arguments, results, exact):
    return {"doubled": float((results[0] - exact[0]).abs().max()) / 1e-5}


def problems(constants, device):
    return [(torch.ones(3, device=device),)]


for name in NAMES:
    Operator(
        name, kernel_of(name), kernel_of("healthy"), lambda x: {"x": "float32"}, problems, excess, key=lambda x: ()
    )


def look(request):
    yield {"environment": tasks.describe_environment()}
    kinds = [Kind(name, (("x", "float32"),), "interpreter").to_json() for name in NAMES]
    yield {"needs": {"device": "cpu", "why_no_kernels": None, "kinds": kinds, "calls": []}}


if __name__ == "__main__":
    tasks.TASKS["look"] = look
    tasks.main()
