"""The lists of networks with SE blocks, and of the slots that these sit in: timm 1.0.31 and torchvision 0.29."""

import csv
from pathlib import Path


def rows(file_name: str) -> list[dict[str, str]]:
    with (Path(__file__).parent / "data" / file_name).open() as file:
        return list(csv.DictReader(file))


def short(class_name: str) -> str:
    """A class name as the lists give it."""
    return class_name.removeprefix("timm.").replace("models.", "").replace("squeeze_excite.", "")
