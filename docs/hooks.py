"""Files from outside docs/ for the site: pictures of the results, and the notes beside the benchmarks."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PREFIXES = {"../benchmarks/results/": "results/", "../benchmarks/": ""}


def on_files(files: Files, config: Any) -> Files:
    """Add each picture as results/NAME, and NOTES.md as a page."""
    for path in (BENCHMARKS / "NOTES.md", *(BENCHMARKS / "results").glob("*.png")):
        files.append(File.generated(config, str(path.relative_to(BENCHMARKS)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links that leave docs/, as the repository needs them, to these files."""
    for outside, inside in PREFIXES.items():
        markdown = markdown.replace(f"]({outside}", f"]({inside}")
    return markdown
