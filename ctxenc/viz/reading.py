"""Pictures as the networks get them: which formats are read, and what becomes of those that are not 8 bits a channel."""

import numpy as np
from PIL import Image

# Pillow knows others too; of PostScript, whatever it is called, it would have Ghostscript run the program.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture decoded, as RGB: 16 bits a channel become their upper 8, transparency is left out.

    It is not turned as its EXIF orientation says, as timm and torchvision do not turn it.

    Raises:
        ValueError: it has 32 bits a channel, whose white is not known.
    """
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not sixteen:
        raise ValueError(f"image must have 8 or 16 bits a channel, got 32 (mode {image.mode})")
    if sixteen:  # which convert() would clip at 255
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
