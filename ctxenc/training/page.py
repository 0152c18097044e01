"""Write report.html: a finished run on one page without external files or network access."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from ctxenc.runs.config import atomic
from ctxenc.runs.errors import printable
from ctxenc.training import pictures

FILE = "report.html"
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1040px; margin: 2em auto; padding: 0 1em; }
h1, h2, h3 { line-height: 1.2; }
h2 { margin-top: 2em; border-bottom: 1px solid #8884; }
table { border-collapse: collapse; display: block; overflow-x: auto; white-space: nowrap; }
details table { white-space: normal; }
th, td { padding: .3em .8em; border-bottom: 1px solid #8884; text-align: left; vertical-align: top; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
nav a { margin-right: 1em; }
.gain { font-size: 20px; font-weight: bold; }
summary { cursor: pointer; }
figure { margin: 1em 0; }
figcaption { font-size: 14px; opacity: .8; }
img { max-width: 100%; background: white; }
"""
# The page fetches nothing and runs nothing, even if a class or file name is malicious.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_page(
    run: Path,
    title: str,
    gains: Sequence[str],
    header: Sequence[str],
    cells: Sequence[Sequence[str]],
    notes: Sequence[str],
    arms: Mapping[str, str],
    settings: Mapping[str, object],
) -> None:
    """Write report.html into `run`.

    Args:
        run: The folder of a finished run, with its curves.
        title: Title of the page.
        gains: Differences of the networks, the first thing on the page.
        header: Header of the table of results.
        cells: Rows of the table.
        notes: Notes beside the table, one per paragraph.
        arms: Titles of the arms, by the folder of their pictures.
        settings: Every setting of the run.

    Raises:
        UserError: It cannot be written.
    """
    sections = {"Results": _results(run, header, cells, notes)}
    for folder, name in arms.items():
        sections[name] = _arm(run / folder / pictures.FOLDER)
    listing = _table(("setting", "value"), [(key, str(value)) for key, value in settings.items()])
    sections["Settings"] = f"<details><summary>All {len(settings)} settings</summary>{listing}</details>"
    with atomic(run / FILE) as path:
        path.write_text(_page(printable(title), gains, sections), encoding="utf-8")


def _results(run: Path, header: Sequence[str], cells: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    paragraphs = "".join(f"<p>{escape(note)}</p>" for note in notes)
    predictions = run / "predictions.png"
    picture = _picture(predictions, "Predictions of the first seed") if predictions.is_file() else ""
    return (
        _table(header, cells) + picture + paragraphs + _picture(run / "curves.png", "The score and the loss by epoch")
    )


def _arm(folder: Path) -> str:
    """Return an arm's existing pictures as HTML."""
    captions = {
        pictures.CONFUSION: "Classes that are taken for others: the share of each true class, after the last epoch",
        pictures.WORST: "The worst images after the last epoch, with the loss or the share of wrong pixels",
        pictures.CODEBOOKS: "The health of the codebooks by epoch (dashed line: a block below it assigns all pixels almost alike)",
    }
    parts = [_picture(folder / name, caption) for name, caption in captions.items() if (folder / name).is_file()]
    for path in sorted(folder.glob(pictures.ASSIGNMENT.format("*"))):
        parts.append(
            _picture(path, "Which codeword owns which pixel (no colour: none), and what the gates let through")
        )
    if (folder / pictures.CODEBOOKS).is_file():
        parts.append(
            f"<p>No codeword maps of blocks whose maps are smaller than {pictures.SMALLEST} x {pictures.SMALLEST} pixels.</p>"
        )
    return "".join(parts)


def _table(header: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(each)}</th>" for each in header)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(printable(cell))}</td>' for cell in row)}</tr>" for row in cells)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def _picture(path: Path, caption: str) -> str:
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    text = escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{content}"><figcaption>{text}</figcaption></figure>\n'


def _page(title: str, gains: Sequence[str], sections: Mapping[str, str]) -> str:
    links = "".join(f'<a href="#section-{number}">{escape(name)}</a>' for number, name in enumerate(sections))
    top = "".join(f'<p class="gain">{escape(each)}</p>' for each in gains)
    body = "".join(
        f'<h2 id="section-{number}">{escape(name)}</h2>\n{content}\n'
        for number, (name, content) in enumerate(sections.items())
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><link rel="icon" href="data:,">'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>{top}<nav>{links}</nav>\n{body}</body></html>\n"
    )
