"""Read image files as RGB images."""

import errno
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from ctxenc.runs.errors import UserError, one_line
from ctxenc.training.bad_images import BrokenImageError
from ctxenc.viz.reading import FORMATS, as_rgb


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """Yield the first image in the file at `path`; the body decodes it.

    Raises:
        BrokenImageError: The file is not an image, is damaged, or has more than Pillow's 179 million pixels; the text holds the
            path.
        UserError: The file is missing, or the system refuses it.
    """
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a named pipe would block
            raise BrokenImageError(f"broken image {path}: it is no file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata and large images: the pixels are intact
            with Image.open(path, formats=FORMATS) as image:
                yield image
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        # EINVAL comes from a wrong offset in the file.
        refused = isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)
        if refused and not os.path.islink(path):
            raise UserError(f"cannot read image {path}: {getattr(error, 'strerror', error)}") from error
        reason = getattr(error, "strerror", None) or one_line(error).replace(repr(str(path)), "it")
        raise BrokenImageError(f"broken image {path}: {reason}") from error


def open_image(path: str | Path) -> Image.Image:
    """Return the image at `path`, decoded, as RGB: keep the upper 8 of 16 bits per channel, ignore transparency.

    Like timm and torchvision, ignore the EXIF orientation; see `orientation`.

    Raises:
        BrokenImageError: The file is not an image, is damaged, or has 32 bits per channel, with an unknown white; the text
            holds the path.
        UserError: The file is missing, or the system refuses it.
    """
    with opened(path) as image:
        return as_rgb(image)


def orientation(path: str | Path) -> int:
    """Return the EXIF orientation of the image at `path`: 1, or 2 to 8 if a viewer mirrors or turns it; 1 for a broken image."""
    try:
        with opened(path) as image:
            number: Any = image.getexif().get(ExifTags.Base.Orientation)
    except BrokenImageError:
        return 1
    return number if number in range(1, 9) else 1
