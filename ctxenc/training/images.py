"""Image files as RGB images."""

import errno
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import ExifTags, Image

from ctxenc.training.bad_images import BrokenImageError
from ctxenc.training.console import UserError, one_line
from ctxenc.viz.reading import FORMATS, as_rgb


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """The first image in the file at ``path``, to be decoded in the body.

    Raises:
        BrokenImageError: It is no image, is damaged, or has more than Pillow's 179 million pixels; the text holds the path.
        UserError: The file is not there, or the system refuses it.
    """
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a named pipe would be waited for
            raise BrokenImageError(f"broken image {path}: it is no file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata and large images: the pixels are whole
            with Image.open(path, formats=FORMATS) as image:
                yield image
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds
        told = isinstance(error, OSError) and error.errno not in (
            None,
            errno.EINVAL,
        )  # the latter of a wrong offset in the file
        if told and not os.path.islink(path):
            raise UserError(f"cannot read image {path}: {getattr(error, 'strerror', error)}") from error
        reason = getattr(error, "strerror", None) or one_line(error).replace(repr(str(path)), "it")
        raise BrokenImageError(f"broken image {path}: {reason}") from error


def open_image(path: str | Path) -> Image.Image:
    """The image at ``path``, decoded, as RGB: 16 bits a channel become their upper 8, transparency is left out.

    It is not turned as its EXIF orientation says, as timm and torchvision do not turn it; see ``orientation``.

    Raises:
        BrokenImageError: It is no image, is damaged, or has 32 bits a channel, whose white is not known; the text holds the path.
        UserError: The file is not there, or the system refuses it.
    """
    with opened(path) as image:
        return as_rgb(image)


def orientation(path: str | Path) -> int:
    """Return the EXIF orientation of the image at `path`: 1, or 2 to 8 where a viewer mirrors or turns it; 1 for a broken image."""
    try:
        with opened(path) as image:
            number: Any = image.getexif().get(ExifTags.Base.Orientation)
    except BrokenImageError:
        return 1
    return number if number in range(1, 9) else 1
