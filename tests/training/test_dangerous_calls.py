"""What the package never calls: whatever runs code that it reads, unpacks archives, or starts programs."""

import ast
from pathlib import Path

import pytest

import ctxenc

ROOT = Path(ctxenc.__file__).parent
MODULES = {
    "pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "yaml",
    "subprocess",
    "tarfile",
    "zipfile",
    "runpy",
    "code",
}
BUILTINS = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    *(
        "system",
        "popen",
        "startfile",
        "extractall",
        "unpack_archive",
        "load_state_dict_from_url",
        "jit.load",
        "hub.load",
    ),
    *(
        "yaml.load",
        "yaml.unsafe_load",
        "export.load",
        "import_module",
        "hf_hub_download",
        "snapshot_download",
        "fromfile",
    ),
}
# What is allowed, and why.
ALLOWED = {
    ("__init__.py", "import_module"): "modules of ours, named in its tables",
    ("__main__.py", "importlib.import_module"): "a module of ours, named in the table of commands",
    ("commands/segment.py", "importlib.import_module"): "a module of ours, named in its table of commands",
    ("runs/trained.py", "importlib.import_module"): "the user's own module, named on the command line",
    ("swap/calibration.py", "import_module"): "timm's or torchvision's module of a class, from the table of SE blocks",
    ("training/exporting.py", "importlib.import_module"): "onnxruntime, by its name",
    ("diagnosis/examination.py", "subprocess"): "this Python, for each kernel a process that may crash or hang",
    ("diagnosis/tasks.py", "subprocess"): "nvidia-smi, for the version of the driver",
    ("diagnosis/tasks.py", "importlib.import_module"): "timm, which need not be there",
    (
        "integrations/state_dicts.py",
        "zipfile",
    ): "the sizes of a checkpoint's parts, before torch reads it; nothing is unpacked",
    ("training/exporting.py", "torch.export.load"): "the file that it wrote a moment ago",
}


def name_of(node):
    """A dotted name as it stands in the source; what is no name in it is empty."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def problems(source):
    """What a module should not have, as (line, name)."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            yield from ((line, name) for name in names if name.partition(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        name, keywords = name_of(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
        if name in BUILTINS or any(f".{name}".endswith(f".{each}") for each in ATTRIBUTES):
            yield line, name
        if name == "torch.load" and keywords.get("weights_only") != "True":
            yield line, name
        if name.endswith("os.exec") or name.startswith(("os.exec", "os.spawn", "os.posix_spawn")):
            yield line, name
        for keyword, value in (
            ("allow_pickle", "True"),
            ("shell", "True"),
            ("weights_only", "False"),
            ("trust_remote_code", "True"),
        ):
            if keywords.get(keyword) == value:
                yield line, f"{name}({keyword}={value})"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_modules(path):
    name = path.relative_to(ROOT).as_posix()
    found = [each for each in problems(path.read_text(encoding="utf-8")) if (name, each[1]) not in ALLOWED]
    assert not found


def test_what_is_allowed_is_there():
    for name, call in ALLOWED:
        assert call in {each for _, each in problems((ROOT / name).read_text(encoding="utf-8"))}, (name, call)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml.loader",
        "from subprocess import run",
        "eval('1')",
        "exec(text)",
        "x = torch.load(path)",
        "x = torch.load(path, weights_only=False)",
        "x = torch.load(path, weights_only=flag)",
        "np.load(path, allow_pickle=True)",
        "os.system('ls')",
        "os.execv('/bin/ls', [])",
        "run('ls', shell=True)",
        "archive.extractall()",
        "open(path).archive.extractall()",
        "shutil.unpack_archive(path)",
        "import_module(name)",
        "torch.hub.load('a', 'b')",
        "torch.jit.load(path)",
    ],
)
def test_the_search_finds(source):
    assert list(problems(source))


@pytest.mark.parametrize(
    "source", ["model.eval()", "torch.load(path, weights_only=True)", "re.compile('a')", "json.load(file)"]
)
def test_the_search_lets_pass(source):
    assert not list(problems(source))
