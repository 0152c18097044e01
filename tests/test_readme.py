"""The README: its Python runs as it stands, its commands are real, and its tables are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import context_scenes, encode, swap, warm_start

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_python_snippet_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize(
    ("name", "benchmark"),
    [
        ("encode_cpu", encode),
        ("swap_cpu", swap),
        ("swap_cpu_compile", swap),
        ("warm_start", warm_start),
        ("context_scenes", context_scenes),
    ],
)
def test_tables_are_the_committed_results(name, benchmark):
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    shown = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, flags=re.S)
    assert shown is not None
    assert shown[1] == benchmark.markdown(result)


def test_pictures_are_there():
    shown = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert shown
    assert all((ROOT / path).is_file() for path in shown)


def test_commands_of_the_readme_exist():
    from ctxenc.__main__ import COMMANDS

    named = set(re.findall(r"python -m ctxenc (\w+)", README))
    assert named == set(COMMANDS)
