"""Faults that tests must find: each mutant changes a line in a copy of the sources, and the tests that it names must then fail.

    python -m tests.mutants [WORD ...]  # those whose names hold one of the words

Needs the test extra. A change of a kernel is no reason to change a test; where a line has moved, give its new form here.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
FUSED = "ctxenc/kernels/fused/"
ENCODE = "tests/interpreted/test_encode.py"


class Mutant(NamedTuple):
    """One fault: every place in a file where a text stands gets another."""

    name: str
    file: str
    text: str
    instead: str
    tests: tuple[str, ...]  # arguments of pytest


def solves(operator: str, form: str) -> tuple[str, ...]:
    """The proofs of an encode operator."""
    return (ENCODE, "-k", f"solves_its_proof and {operator}- and {form}")


LOW = "        cross -= dot(operand, low, DOT)"
IMAGE = "(tile // tiles).to(tl.int64), stride_b"
BASE = "tl.where(tl.abs(c) > tl.max(tl.abs(d), 1) * OFFSET, round_operand(c, DOT).to(tl.float32), 0.0)"
CENTER = 'return tl.minimum(tl.argmin(tl.where(o_k < K, distance, float("inf")), 0), K - 1)'
REFUSED = ("tests/interpreted/test_verdicts.py", "-k", "never_refused")
APART = (ENCODE, "-k", "gigabytes")
MUTANTS = [
    *(
        Mutant(
            f"low-order operand of the codewords dropped, {operator}, {form}",
            FUSED + "steps.py",
            LOW,
            "        pass",
            solves(operator, form),
        )
        for operator in ("encode", "encode_backward")
        for form in ("narrow", "wide")
    ),
    Mutant(
        "low-order operand with the wrong sign",
        FUSED + "steps.py",
        LOW,
        LOW.replace("-=", "+="),
        solves("encode", "narrow"),
    ),
    Mutant("base of half precision zeroed", FUSED + "steps.py", BASE, "c * 0.0", (ENCODE, "-k", "far_off_the_origin")),
    Mutant(
        "base of float32 zeroed",
        FUSED + "steps.py",
        "base, x_scale = c, 1.0",
        "base, x_scale = c * 0.0, 1.0",
        solves("encode", "narrow"),
    ),
    Mutant(
        "scale of fp16 left out",
        FUSED + "steps.py",
        "tl.maximum(tl.max(tl.max(tl.abs(value), 1), 0), 1e-30)",
        "1.0",
        (ENCODE, "-k", "far_off_the_origin"),
    ),
    Mutant(
        "alignment of x's base not checked",
        FUSED + "tiles.py",
        "x.data_ptr() % width == 0 and ",
        "",
        ("tests/test_tiles.py", "-k", "wide_loads"),
    ),
    Mutant(
        "share of tiles floored, an image",
        FUSED + "tiles.py",
        "return ceil_div(tiles, share), share",
        "return tiles // share, share",
        ("tests/test_tiles.py", "-k", "every_tile"),
    ),
    Mutant(
        "image offset of 32 bits, narrow",
        FUSED + "steps.py",
        IMAGE,
        "(tile // tiles).to(tl.int32), stride_b",
        (*APART[:2], "gigabytes and narrow"),
    ),
    Mutant(
        "image offset of 32 bits, wide",
        FUSED + "wide.py",
        "pid = tl.program_id(0).to(tl.int64)",
        "pid = tl.program_id(0)",
        (*APART[:2], "gigabytes and wide"),
    ),
    Mutant(
        "last pixel lost",
        FUSED + "steps.py",
        "(o_n < N)[:, None] & (o_d < D)[None, :]",
        "(o_n < N - 1)[:, None] & (o_d < D)[None, :]",
        solves("encode", "narrow"),
    ),
    Mutant(
        "weights of pixels beyond the last",
        FUSED + "steps.py",
        "tl.where(m_n[:, None], exp / ",
        "tl.where(m_n[:, None] | True, exp / ",
        solves("encode", "narrow"),
    ),
    Mutant(
        "center follows one codeword",
        FUSED + "steps.py",
        CENTER,
        "return tl.minimum(0, K - 1)",
        (ENCODE, "-k", "far_away"),
    ),
    Mutant(
        "means not taken, forward",
        FUSED + "forward.py",
        "sums * (-1.0 / count) / x_scale",
        "-sums / x_scale",
        solves("encode", "narrow"),
    ),
    Mutant("gradients of means, wide", FUSED + "wide.py", " * (1.0 / count)", "", solves("encode_backward", "wide")),
    Mutant("gradients of means", FUSED + "backward.py", " * (1.0 / count)", "", solves("encode_backward", "narrow")),
    Mutant(
        "a split left out of the sum",
        FUSED + "forward.py",
        "for row in range(rows):",
        "for row in range(rows - 1):",
        solves("encode", "narrow"),
    ),
    Mutant(
        "a row left out of backward's sum",
        FUSED + "backward.py",
        "mask=m & (row < rows)",
        "mask=m & (row < rows - 1)",
        solves("encode_backward", "narrow"),
    ),
    Mutant(
        "gate: gradient of half-precision logits lost",
        FUSED + "gate.py",
        "tl.sum(sums, 1) * slope, c < C",
        "tl.sum(sums, 1) * slope * (1.0 if p_dlogits.dtype.element_ty == tl.float32 else 0.0), c < C",
        REFUSED,
    ),
    Mutant("pool: batches not counted", FUSED + "pool.py", "tl.store(p_tracked, tracked)", "pass", REFUSED),
    Mutant(
        "pool: variance by the mean square",
        FUSED + "pool.py",
        "squares = tl.sum(squares + sizes * away * away, 1)",
        "squares = tl.sum(squares + sizes * means * means, 1) - values * mean * mean",
        REFUSED,
    ),
    Mutant(
        "projection: shift of the last channel lost",
        FUSED + "project.py",
        "tl.load(p_shift + o_d, mask=o_d < D, other=0.0)",
        "tl.load(p_shift + o_d, mask=o_d < D - 1, other=0.0)",
        REFUSED,
    ),
    Mutant(
        "a wrong kernel's proof passes",
        "ctxenc/kernels/verdicts.py",
        "if excess[worst] > 1:",
        "if excess[worst] > 1e9:",
        ("tests/interpreted/test_verdicts.py", "-k", "wrong_kernel or wrong_pool"),
    ),
    Mutant(
        "a proof runs once",
        "ctxenc/kernels/verdicts.py",
        "for _ in range(RUNS - 1):",
        "for _ in range(0):",
        ("tests/interpreted/test_verdicts.py", "-k", "wavers"),
    ),
    Mutant(
        "a kernel is tried in a graph capture",
        "ctxenc/kernels/verdicts.py",
        "if _is_capturing(device):",
        "if False:",
        ("tests/interpreted/test_verdicts.py", "-k", "graph_capture"),
    ),
]


def outcome(tests: tuple[str, ...], mutant: Mutant | None = None) -> str:
    """Run tests on a copy of the sources, with a mutant's fault in it: "pass", "fail", or what else happened."""
    with tempfile.TemporaryDirectory() as scratch:
        for part in ("ctxenc", "tests", "pyproject.toml"):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, Path(scratch, part))
        if mutant:
            path = Path(scratch, mutant.file)
            source = path.read_text()
            if mutant.text not in source:
                return f"{mutant.file} does not hold {mutant.text!r}"
            path.write_text(source.replace(mutant.text, mutant.instead))
        settings = {"PYTHONPATH": scratch, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(command, cwd=scratch, env=os.environ | settings, capture_output=True, text=True)
    said = f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return {0: "pass", 1: "fail"}.get(done.returncode, said)


def main(words: list[str]) -> int:
    """Print what becomes of each mutant; the exit status is 0 if all die, by tests that pass without them."""
    chosen = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        without = {tests: pool.submit(outcome, tests) for tests in {mutant.tests: None for mutant in chosen}}
        runs = [(mutant, pool.submit(outcome, mutant.tests, mutant)) for mutant in chosen]
        dead = 0
        for mutant, run in runs:
            found, fate = (without[mutant.tests].result(), run.result()), "LIVES"
            if found == ("pass", "fail"):
                fate, dead = "dies", dead + 1
            elif found != ("pass", "pass"):
                fate = f"shows nothing (without it: {found[0]}; with it: {found[1]})"
            print(f"{fate}: {mutant.name}", flush=True)
    print(f"{dead} of {len(chosen)} mutants die")
    return int(dead < len(chosen) or not chosen)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
