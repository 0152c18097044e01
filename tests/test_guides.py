"""The site: each guide's Python runs, the line for validate.py works, and the reference names every public name."""

import ast
import importlib
import inspect
import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

import ctxenc

DOCS = Path(__file__).parent.parent / "docs"
GUIDES = sorted((DOCS / "guides").glob("*.md"))
PRESENT = {"torch", "timm", "ctxenc", "my_models", *sys.stdlib_module_names}
MARK_OR_BLOCK = re.compile(r"<!-- needs: ([\w, ]+) -->|```python(?: title=\"(\w+\.py)\")?\n(.*?)```", flags=re.S)


class Block(NamedTuple):
    """Python of a page, the packages that the mark before it names, and the file to write it to where it has a title."""

    needs: set[str]
    file: str | None
    code: str


def blocks_of(page: Path) -> list[Block]:
    found, needs = [], set()
    for mark, file, code in MARK_OR_BLOCK.findall(page.read_text()):
        if mark:
            needs = set(mark.split(", "))
        else:
            found.append(Block(needs, file or None, code))
            needs = set()
    assert not needs, f"{page.name}: a mark without a block"
    return found


def run_page(page: Path, folder: Path, missing: set[str]) -> int:
    """Run the blocks of a page in this process, in order, in one namespace; leave out those that need what is missing."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    names, ran = {"__name__": "guide"}, 0
    for number, (needs, file, code) in enumerate(blocks_of(page)):
        if needs & missing:
            continue
        ran += 1
        if file:
            (folder / file).write_text(code)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("default" if needs else "error")  # other packages may warn
            exec(compile(code, f"{page.name}, block {number}", "exec"), names)
    return ran


@pytest.fixture(scope="module")
def fresh():
    """Runs a function in a process of its own: trainers, process groups and register_se_class leave traces."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", "ctxenc", "tests.test_guides"])
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        yield lambda *task: pool.submit(*task).result(timeout=300)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_a_guide_runs(page, tmp_path, fresh):
    blocks = blocks_of(page)
    missing = {name for block in blocks for name in block.needs if find_spec(name) is None}
    ran = fresh(run_page, page, tmp_path, missing)
    assert ran == sum(not block.needs & missing for block in blocks)
    if missing:
        pytest.skip(f"ran {ran} of {len(blocks)} blocks, the others need {', '.join(sorted(missing))}")


def test_a_block_that_fails_is_seen(tmp_path, fresh):
    (tmp_path / "page.md").write_text(
        "```python\nx = 1\n```\n\n<!-- needs: nothing_such -->\n\n```python\nassert x == 2\n```\n"
    )
    assert fresh(run_page, tmp_path / "page.md", tmp_path, {"nothing_such"}) == 1
    with pytest.raises(AssertionError):
        fresh(run_page, tmp_path / "page.md", tmp_path, set())


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.stem)
def test_marks_name_what_a_guide_imports(page):
    blocks = blocks_of(page)
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block.code)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {module.partition(".")[0] for module in modules} <= PRESENT | block.needs


def test_the_line_for_validate_finds_the_model(tmp_path):
    page = DOCS / "guides" / "timm.md"
    (line,) = re.findall(r"^PYTHONPATH=\. python -c .*?(?=\n```)", page.read_text(), flags=re.M | re.S)
    (module,) = (block for block in blocks_of(page) if block.file)
    (tmp_path / module.file).write_text(module.code)
    script = (
        "import sys, timm\nprint(sys.argv[0], sum(1 for _ in timm.create_model(sys.argv[2]).modules()) > 1, __name__)"
    )
    (tmp_path / "validate.py").write_text(script)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(DOCS.parent)])}
    command = [sys.executable, *shlex.split(line.replace("\\\n", ""))[2:]]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout == "validate.py True __main__\n", done.stderr


@pytest.mark.parametrize("package", ["ctxenc", "ctxenc.integrations", "ctxenc.viz"])
def test_the_reference_names_every_public_name(package):
    page = DOCS / "reference" / f"{package.rpartition('.')[2]}.md"
    named = re.findall(r"^::: (\S+)$", page.read_text(), flags=re.M)
    assert sorted(named) == sorted(f"{package}.{name}" for name in importlib.import_module(package).__all__)


def test_every_page_is_in_the_site():
    listed = re.findall(r": ([\w/]+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), flags=re.M)
    assert sorted(listed) == sorted(["NOTES.md", *(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))])


def test_the_options_page_has_each_option_with_its_default():
    rows = re.findall(r"^\| \[`(\w+)`\]\(#(\w+)\) \| (.*?) \|", (DOCS / "options.md").read_text(), flags=re.M)
    parameters = inspect.signature(ctxenc.patch_se_blocks).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.name not in ("model", "filter_fn", "fill_empty")}
    assert {name for name, _, _ in rows} == defaults.keys()
    for name, anchor, default in rows:
        assert anchor == name
        expected = json.dumps(defaults[name]) if isinstance(defaults[name], str) else str(defaults[name])
        assert default.strip("`") == ("the SE block's" if name == "rd_ratio" else expected)
