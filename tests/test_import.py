"""Importing needs torch alone, and the arrows between modules point one way: both proved from outside."""

import ast
import json
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import ctxenc

PACKAGE = Path(ctxenc.__file__).parent
EXTRAS = ("timm", "torchvision", "triton", "numpy", "accelerate", "safetensors", "matplotlib", "PIL", "skimage", "onnx")

# Lowest first: a module imports from those before its own place only.
# "__init__" stands for the public names, `import ctxenc`.
ORDER = (
    "kernels",
    "functional",
    "encoding",
    "context",
    "weight_decay",
    "swap",
    "__init__",
    "integrations",
    "viz",
    "diagnosis",
    "runs",
    "training",
    "commands",
)
ENTRANCES = ("__init__", "__main__")  # made to reach everywhere
ABOVE = ("training", "commands")  # what is no part of the library


def run_fresh(code: str) -> str:
    """The output of code in a new interpreter."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_but_training_works_with_the_extras_blocked():
    out = run_fresh(f"""
        import sys
        blocked = {EXTRAS}

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in blocked:
                    raise ModuleNotFoundError(f"{{name}} is blocked")

        sys.meta_path.insert(0, Blocker())
        assert not set(blocked) & set(sys.modules)
        import torch
        import ctxenc
        from torch import nn

        x = torch.randn(2, 16, 5, 5, requires_grad=True)
        ctxenc.encode(x, torch.randn(4, 16), torch.rand(4)).sum().backward()
        assert x.grad.isfinite().all()
        assert ctxenc.assign(x, torch.randn(4, 16), 0.5).shape == (2, 4, 5, 5)
        assert ctxenc.Encoding(16, 4)(x).shape == (2, 4, 16)
        ctxenc.ContextEncoding(16, 4)(x).sum().backward()
        toy = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU())
        assert ctxenc.find_se_blocks(toy) == []
        try:
            ctxenc.patch_se_blocks(toy)
        except ValueError as error:
            print(error)
        try:
            ctxenc.load("nowhere")
        except ImportError as error:
            print(error)
        assert ctxenc.backend_info().backend == "torch"
        try:
            import ctxenc.integrations
        except ImportError as error:
            print(error)
    """)
    nothing, extra, integrations = out.splitlines()
    assert "no channel attention" in nothing
    assert "ctxenc[train]" in extra
    assert "ctxenc[timm]" in integrations


def test_a_plain_import_brings_in_none_of_the_extras():
    """What torch alone brings along, such as NumPy, is torch's."""
    out = run_fresh("""
        import json, sys
        import torch
        before = set(sys.modules)
        from ctxenc import *
        print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
    """)
    brought = json.loads(out)
    assert "ctxenc" in brought
    assert not set(EXTRAS) & set(brought)


def test_the_public_names_come_when_they_are_used():
    """The command line answers --help without torch, and models that were pickled need no import by hand."""
    saved = pickle.dumps(ctxenc.ContextEncoding, protocol=2).replace(b"cctxenc.context\n", b"cctxenc.patching\n")
    out = run_fresh(f"""
        import pickle, sys
        import ctxenc
        assert "torch" not in sys.modules
        assert set(ctxenc.__all__) < set(dir(ctxenc))
        block = pickle.loads({saved!r})
        assert block is ctxenc.ContextEncoding is ctxenc.context.ContextEncoding
        print(sorted(ctxenc.__all__) == sorted(name for name in ctxenc.__all__ if hasattr(ctxenc, name)))
        try:
            ctxenc.nothing
        except AttributeError as error:
            print(error)
    """)
    assert out.splitlines() == ["True", "module 'ctxenc' has no attribute 'nothing'"]


def imports_of(path: Path) -> set[str]:
    """Modules and names inside ctxenc that a file imports, anywhere in it, as ctxenc.a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the arrow"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.partition(".")[0] == "ctxenc"}


FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in FILES}


def layer_of(name: str) -> str:
    """The layer of ctxenc.kernels.torch_encode is kernels, that of ctxenc.encode is __init__."""
    part = (name + ".").split(".")[1]
    return part if part in MODULES else "__init__"


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if path.relative_to(PACKAGE).with_suffix("").parts[0] not in ENTRANCES],
    ids=lambda path: str(path.relative_to(PACKAGE)),
)
def test_arrows_point_one_way(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = parts[0]
    assert own in ORDER, f"{own} has no place in the order of the layers"
    for name in imports_of(path):
        other = layer_of(name)
        assert other in ORDER, f"{path.name} imports {name}"
        assert ORDER.index(other) <= ORDER.index(own), f"{own} imports {name}, which is above it"
        if own == "kernels":  # the PyTorch path stands alone; the fused one falls back to it
            assert parts[-1] not in ("torch_encode", "reference"), f"kernels/{path.name} imports {name}"


LIBRARY = [path for path in FILES if path.relative_to(PACKAGE).parts[0] not in (*ABOVE, "__main__.py")]


@pytest.mark.parametrize("path", LIBRARY, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_library_knows_no_training_and_no_command(path):
    """By no import, and by no name in a text either."""
    assert not {layer_of(name) for name in imports_of(path)} & set(ABOVE)
    assert not [name for name in ABOVE if f"ctxenc.{name}" in path.read_text()]


def test_a_run_is_loaded_without_training():
    out = run_fresh("""
        import sys
        sys.modules |= {"ctxenc.training": None, "ctxenc.commands": None}
        import ctxenc, ctxenc.integrations, ctxenc.viz, ctxenc.diagnosis.tasks
        try:
            ctxenc.load("nowhere")
        except Exception as error:
            print(error)
    """)
    assert out == "no run at nowhere\n"


def test_no_file_name_occurs_twice():
    names = [path.name for path in FILES if path.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


def test_the_parser_sees_arrows():
    """The test above is no proof if it sees nothing."""
    assert {layer_of(name) for name in imports_of(PACKAGE / "context.py")} == {"encoding", "functional", "kernels"}
    assert {layer_of(name) for name in imports_of(PACKAGE / "functional.py")} == {"kernels"}
    assert layer_of("ctxenc") == layer_of("ctxenc.encode") == "__init__"
    assert layer_of("ctxenc.training.console") == "training"
    assert "training" in {layer_of(name) for name in imports_of(PACKAGE / "commands" / "finetune.py")}
    assert len(FILES) > 8
    assert PACKAGE / "runs" / "trained.py" in LIBRARY
