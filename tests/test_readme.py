"""README.md and docs/: their Python runs, their commands and links are real, their tables are those of the committed results."""

import json
import re

import pytest

from benchmarks.pages import MARKED, PAGES, ROOT, filled, table
from benchmarks.record import RESULTS
from benchmarks.swap_accuracy import differences, interval

README = (ROOT / "README.md").read_text()
SNIPPETS = [
    pytest.param(snippet, id=f"{page.name}-{number}")
    for page in PAGES
    for number, snippet in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S))
]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_there_is_something_to_check():
    assert len(SNIPPETS) >= 3
    assert "](docs/kernels.md)" in README
    assert "](benchmarks/results/" in README


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_python_snippet_runs(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


@each_page
def test_tables_are_the_committed_results(page):
    text = page.read_text()
    assert text == filled(text), "run python -m benchmarks.pages"


def test_every_result_has_a_table():
    named = {found["name"] for page in PAGES for found in MARKED.finditer(page.read_text()) if not found["rows"]}
    assert named == {
        "encode_cpu",
        "swap_cpu",
        "swap_cpu_choices",
        "swap_cpu_compile",
        "swap_accuracy",
        "warm_start",
        "context_scenes",
        "context_scenes_start",
    }


def test_differences_in_words_are_those_of_the_result():
    """README and docs say by how much the scenes' networks differ, with 95 % intervals over the seeds."""
    scores: dict[str, list[float]] = {}
    for row in json.loads((RESULTS / "context_scenes_start.json").read_text())["rows"]:
        scores.setdefault(row["name"], []).append(100 * row["mean_iou"])

    def gain(one: str, other: str) -> tuple[float, float]:
        return interval([a - b for a, b in zip(scores[one], scores[other], strict=True)])

    (mean, reach), (cost, spread) = gain("encnet", "fcn_se"), gain("encnet", "encnet, spread")
    said = (
        f"{mean - reach:.1f} to {mean + reach:.1f}",
        f"{cost:.1f} points",
        f"{cost - spread:.1f} to {cost + spread:.1f}",
    )
    assert f"{mean:.1f} points of mIoU" in README
    assert said[0] in README
    measurements = (ROOT / "docs" / "measurements.md").read_text()
    assert all(each in measurements for each in (f"{mean:.1f} points above", *said))


def test_the_swaps_differences_in_words_are_those_of_the_result():
    rows = json.loads((RESULTS / "swap_accuracy.json").read_text())["rows"]

    def points(data: str, name: str, scale: str = "") -> tuple[float, float, float]:
        own = [row for row in rows if row["data"] == data]
        mean, reach = interval([100 * each for each in differences(own, name, "SE", scale=scale)])
        return mean, mean - reach, mean + reach

    readme, measurements, options = (
        (ROOT / name).read_text() for name in ("README.md", "docs/measurements.md", "docs/options.md")
    )
    fashion, digits = (points(data, "mean, paper") for data in ("fashion_mnist", "digits"))
    assert "the swap is {:+.1f} points ({:.1f} to {:+.1f}) above SE".format(*fashion) in readme
    assert "{:+.1f} points on the digits ({:.1f} to {:+.1f})".format(*digits) in measurements
    sums, means = (points("digits", name, "0.75") for name in ("mean, paper, sum", "mean, paper"))
    lost = [f"{-mean:.1f} ({-high:.1f} to {-low:.1f})" for mean, low, high in (sums, means)]
    for page in (measurements, options):
        assert all(text.replace(" (", " points more than SE (") in page or text in page for text in lost)


def test_a_table_of_some_rows():
    whole, some = table("swap_cpu").split("\n"), table("swap_cpu", ["resnet50", "nfnet_f0"]).split("\n")
    assert some[:2] == whole[:2]
    assert some[-2:] == whole[-2:]
    assert {line.split(",")[0] for line in some[2:-2]} == {"| resnet50", "| nfnet_f0"}
    with pytest.raises(ValueError, match="no row begins with 'vgg'"):
        table("swap_cpu", ["resnet50", "vgg"])


def test_a_changed_figure_is_seen():
    found = MARKED.search(README)
    changed = README.replace(found["table"], re.sub(r"\d", "0", found["table"]))
    assert changed != README
    assert filled(changed) == README


def _anchors(text: str) -> set[str]:
    """Those that are made of headings: in lower case, without punctuation, with hyphens."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_and_pictures_are_there(page):
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target.read_text()), link


def test_commands_exist_and_have_a_row():
    from ctxenc.__main__ import COMMANDS

    rows = re.findall(r"^\| `python -m ctxenc (\w+)", (ROOT / "docs" / "commands.md").read_text(), flags=re.M)
    assert set(rows) == set(COMMANDS)
    assert set(re.findall(r"python -m ctxenc (\w+)", README)) <= set(COMMANDS)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 140
    assert len(README.split()) <= 1100
