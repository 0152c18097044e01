"""Read pictures in the networks' format: supported file formats, and conversion to 8 bits a channel."""

import numpy as np
from PIL import Image

# Pillow supports more; for PostScript, under any file name, it would let Ghostscript run the program.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def as_rgb(image: Image.Image) -> Image.Image:
    """Decode the picture as RGB: 16 bits a channel become their upper 8, transparency is dropped.

    The EXIF orientation is ignored, as in timm and torchvision.

    Raises:
        ValueError: it has 32 bits a channel, with an unknown white level.
    """
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not sixteen:
        raise ValueError(f"image must have 8 or 16 bits a channel, got 32 (mode {image.mode})")
    if sixteen:  # convert() would clip these at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
