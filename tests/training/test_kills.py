"""SIGKILL at random moments: what was killed and resumed ends as what was never stopped.

The moments come from a seeded generator: in a step, while a checkpoint is written, between epochs, before the first step.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.training.small_runs import RANDOM, SEGMENT, SMALL, assert_same_run, checkpoints, make_pairs

KILLS = int(os.environ.get("CTXENC_KILLS", "5"))  # of each command
# Has imported everything, and runs each command in a child that it forks: an interpreter of its own takes seconds to start.
SERVER = """
import json, os, signal, sys, time
import ctxenc.training.finetuning, ctxenc.commands.segment
from ctxenc.__main__ import main
for line in sys.stdin:
    arguments, log, kill_after = json.loads(line)
    child = os.fork()
    if not child:
        log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        os._exit(main(arguments))
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """Runs commands, each in a process of its own, and kills them."""

    def __init__(self, log):
        self.log = log
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], text=True, env=environment, **pipes)

    def run(self, arguments, kill_after=None):
        """The exit code, and how long it took."""
        order, started = [[*map(str, arguments)], str(self.log), kill_after], time.perf_counter()
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline()), time.perf_counter() - started


@pytest.fixture
def server(tmp_path):
    made = Server(tmp_path / "log.txt")
    yield made
    made.process.stdin.close()
    assert made.process.wait(timeout=60) == 0
    made.process.stdout.close()


@pytest.mark.parametrize("command", ["finetune", "segment train"])
def test_killed_and_resumed(server, tmp_path, image_folder, command):
    arms = ["se-0", "context-0"] if command == "finetune" else ["encnet-0"]
    data = image_folder if command == "finetune" else make_pairs(tmp_path / "data")
    more = (*SMALL, *RANDOM) if command == "finetune" else (*SEGMENT, "--smoothing", "sampled")
    start = [*command.split(), "--data", data, *more, "--checkpoint-every", 1]
    whole = tmp_path / "whole"
    server.run(["finetune", "--data", "nowhere"])  # waits until it has imported everything
    code, usual = server.run([*start, "--out", whole])
    assert code == 0, server.log.read_text()
    generator, kills, run = random.Random(command), 0, 0
    while True:
        cut = tmp_path / f"cut-{run}"
        delay = generator.uniform(0, usual) if kills < KILLS else None
        code, _ = server.run([*start, "--out", cut, "--resume", "auto"], delay)
        if code == 0:
            assert_same_run(whole, cut, arms)
            assert all(checkpoints(cut / arm) == checkpoints(whole / arm) for arm in arms)
            assert not list(cut.rglob(".*.tmp*"))
            if kills == KILLS:
                return
            run += 1
        else:
            assert code == -signal.SIGKILL, server.log.read_text()
            kills += 1
