"""The README: its Python runs as it stands, its commands are real, and its tables are those of the committed results."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.encode_cpu import markdown

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.S)


def test_there_are_snippets():
    assert len(SNIPPETS) >= 3


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_python_snippet_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


def test_table_of_the_operator_is_the_committed_result():
    result = json.loads((ROOT / "benchmarks/results/encode_cpu.json").read_text())
    shown = re.search(r"<!-- encode_cpu -->\n(.*?)\n<!-- /encode_cpu -->", README, flags=re.S)
    assert shown is not None
    assert shown[1] == markdown(result)


def test_commands_of_the_readme_exist():
    from ctxenc.__main__ import COMMANDS

    named = set(re.findall(r"python -m ctxenc (\w+)", README))
    assert named == set(COMMANDS)
