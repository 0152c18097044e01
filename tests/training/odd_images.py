"""Image files as they come: of every kind that a data set may hold, and of some that it should not."""

import struct
import zlib

import numpy as np
from PIL import Image

TONES = np.arange(0, 65536, 1024, dtype=np.uint16).reshape(8, 8)  # 16 bits; the upper 8 are multiples of 4
GREY = (TONES >> 8).astype(np.uint8)
RGB = np.stack([GREY, GREY[::-1], 255 - GREY], axis=-1)
FRAMES = [Image.new("RGB", (8, 8), colour) for colour in ((200, 0, 0), (0, 200, 0))]
CHANNELS = {0: 1, 4: 2, 2: 3, 6: 4}  # of PNG's colour types


def png(path, width, height, rows, bits=8, colour=0, palette=b""):
    """A PNG of these bytes; Pillow writes none of 16 bits a channel, nor of 2 and 4."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    header += chunk(b"PLTE", palette) if palette else b""
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def sixteen_bits(path, colour):
    """A PNG of 16 bits a channel."""
    pixels = np.repeat(TONES[..., None], CHANNELS[colour], axis=-1).astype(">u2")
    png(path, 8, 8, b"".join(b"\0" + row.tobytes() for row in pixels), 16, colour)


def animated(path):
    """Two frames, the first red."""
    FRAMES[0].save(
        path, save_all=True, append_images=FRAMES[1:], **({"lossless": True} if path.suffix == ".webp" else {})
    )


def with_palette(**more):
    """Writes an image with a palette of grey tones."""
    return lambda path: Image.fromarray(GREY).quantize(64).save(path, **more)


def of_mode(mode, **more):
    """Writes the colours in another mode."""
    return lambda path: Image.fromarray(RGB).convert(mode).save(path, **more)


def cut(path):
    """A JPEG of which the end is missing."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:1500])


def of_type(dtype, scale):
    """Writes the tones as numbers of a type, times a scale."""
    return lambda path: Image.fromarray((TONES * scale).astype(dtype)).save(path)


GREYS = np.stack([GREY] * 3, axis=-1)
RED = np.asarray(FRAMES[0])
# What is written under which name, the RGB pixels that are read, and by how much these may be off.
READ = {
    "grey16.png": (lambda path: sixteen_bits(path, 0), GREYS, 0),
    "rgb16.png": (lambda path: sixteen_bits(path, 2), GREYS, 0),
    "grey16 alpha.png": (lambda path: sixteen_bits(path, 4), GREYS, 0),
    "rgba16.png": (lambda path: sixteen_bits(path, 6), GREYS, 0),
    "grey16.tif": (of_type("<u2", 1), GREYS, 0),
    "cmyk.jpg": (of_mode("CMYK", quality=100, subsampling=0), RGB, 6),  # as Adobe writes it, inverted
    "cmyk.tif": (of_mode("CMYK"), RGB, 0),
    "palette.png": (with_palette(), GREYS, 0),
    "palette, one colour transparent.png": (with_palette(transparency=0), GREYS, 0),
    "palette with alpha.png": (with_palette(transparency=bytes(range(64))), GREYS, 0),
    "palette.gif": (with_palette(), GREYS, 0),
    "grey with alpha.png": (lambda path: Image.fromarray(GREY).convert("LA").save(path), GREYS, 0),
    "with alpha.png": (lambda path: Image.fromarray(np.dstack([RGB, GREY])).save(path), RGB, 0),
    "one bit.png": (lambda path: Image.fromarray(GREY > 99).save(path), np.where(GREYS > 99, 255, 0), 0),
    "one bit.tif": (lambda path: Image.fromarray(GREY > 99).save(path), np.where(GREYS > 99, 255, 0), 0),
    **{f"animated.{suffix}": (animated, RED, 0) for suffix in ("gif", "png", "webp")},
    "pages.tif": (animated, RED, 0),
    "a gif.jpg": (lambda path: FRAMES[0].save(path, format="GIF"), RED, 0),
    "1 x 1.png": (lambda path: Image.new("RGB", (1, 1), (200, 0, 0)).save(path), RED[:1, :1], 0),
    "1 x 5000.png": (
        lambda path: Image.new("RGB", (1, 5000), (200, 0, 0)).save(path),
        np.tile(RED[:1, :1], (5000, 1, 1)),
        0,
    ),
    "\u96ea \U0001f600\n'%s' {0} *[?].png": (of_mode("RGB"), RGB, 0),
    "no text \udcff.png": (of_mode("RGB"), RGB, 0),
}
POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(taken) (w) file closefile\nshowpage\n%%EOF\n"
)
# What is written under which name, and what the error says.
REFUSED = {
    "empty.png": (lambda path: path.write_bytes(b""), "cannot identify"),
    "text.jpg": (lambda path: path.write_text("no image"), "cannot identify"),
    "cut.jpg": (cut, "truncated"),
    "int32.tif": (of_type(np.int32, 1), "must have 8 or 16 bits a channel, got 32 (mode I)"),
    "small int32.tif": (of_type(np.int32, 1 / 1024), "got 32 (mode I)"),
    "float.tif": (of_type(np.float32, 1 / 65535), "got 32 (mode F)"),
    "nan.tif": (of_type(np.float32, np.nan), "got 32 (mode F)"),
    "bomb.png": (lambda path: png(path, 20_000, 20_000, b"", 1), "decompression bomb"),
    "postscript.png": (lambda path: path.write_bytes(POSTSCRIPT), "cannot identify"),
    "nowhere.png": (lambda path: path.symlink_to(path.with_name("no such")), "No such file or directory"),
}
