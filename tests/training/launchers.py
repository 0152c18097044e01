"""How a program of the tests is started in two processes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
    # --cpu starts one process, whatever --num_processes says; --device cpu is the command's own.
    "accelerate launch": (
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
    ),
}


def launched(launcher, folder, *arguments, program="tests.training.two_processes", limit=100):
    """Runs ``program`` in two processes; gives the exit code and all that was printed. What hangs is ended, and fails."""
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", program, *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    log = folder / "log.txt"
    with open(log, "wb") as out:  # a pipe would stay open as long as any process lives
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=ROOT)
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its processes, those that are deaf after 30 seconds
            code = f"ended after {limit} seconds, with {process.wait(60)}"
    return code, log.read_text()
