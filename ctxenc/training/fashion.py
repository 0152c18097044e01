"""Read Fashion-MNIST from its files on disk, in torchvision's or Debian's layout."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets import FashionMNIST

from ctxenc.runs.errors import UserError, one_line

FASHION_MNIST = "fashion_mnist"
MOST_BYTES = 1 << 28  # of an IDX file; Fashion-MNIST's largest has 47 million


class FashionSource:
    """Read Fashion-MNIST in torchvision's layout (FashionMNIST/raw), or from a folder of its four files (Debian's package).

    Args:
        folder: Holds either; files may be gzipped.
        split: "train" or "val" (the test set).
        download: Download missing files through torchvision.

    Raises:
        UserError: A file is missing, does not belong to Fashion-MNIST, or cannot be downloaded.
    """

    def __init__(self, folder: str, split: str, download: bool) -> None:
        prefix = "train" if split == "train" else "t10k"
        names = (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte")
        files: list[Path | None] = []
        try:
            files = [_fashion_file(folder, name) for name in names]
            if download and None in files:
                FashionMNIST(folder, download=True)
                files = [_fashion_file(folder, name) for name in names]
            for name, file in zip(names, files, strict=True):
                if file is None:
                    raise OSError(f"no {name} or {name}.gz there, nor in FashionMNIST/raw")
            images, labels = (_read_idx(file) for file in files if file is not None)
        except (RuntimeError, OSError, EOFError, zlib.error) as error:  # a damaged gzip file raises the last two
            hint = "; --download fetches it" if None in files and not download else ""
            raise UserError(f"{FASHION_MNIST} cannot be had from {folder}{hint}: {one_line(error)}") from error
        self.classes = list(FashionMNIST.classes)
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max() >= len(self.classes):
            raise UserError(
                f"{files[0]} and {files[1]} must hold images of 28 x 28 and as many labels under 10,"
                f" got shapes {images.shape} and {labels.shape}"
            )
        self.images, self.targets, self.split = images, labels.tolist(), split

    def image(self, index: int) -> Image.Image:
        """Return image `index`, as RGB."""
        return Image.fromarray(self.images[index]).convert("RGB")

    def name(self, index: int) -> str:
        """Return the split and number of image `index`."""
        return f"{self.split}:{index}"


def _fashion_file(folder: str, name: str) -> Path | None:
    """Find a file of Fashion-MNIST, in torchvision's layout or Debian's."""
    places = (Path(folder, "FashionMNIST", "raw"), Path(folder))
    found = (place / file for place in places for file in (name, f"{name}.gz"))
    return next((file for file in found if file.is_file()), None)


def _read_idx(path: Path) -> np.ndarray:
    """Read the byte array of an IDX file: two zeros, 8 for bytes, the number of dimensions, each size, the values.

    Raises:
        OSError: The file has another format, or is shorter than its sizes say.
        EOFError: The gzipped file is cut off.
    """
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        content = file.read(MOST_BYTES + 17)  # one byte more than may be, so that gzip reads on to its checksum
    if content[:3] != b"\0\0\x08" or content[3:4] not in (b"\1", b"\2", b"\3"):
        raise OSError(f"{path} is no IDX file of bytes")
    sizes = content[4 : 4 + 4 * content[3]]
    shape = [int(size) for size in np.frombuffer(sizes, ">u4")] if len(sizes) == 4 * content[3] else [0]
    count, values = math.prod(shape), content[4 + len(sizes) :]
    if not 0 < count <= MOST_BYTES:
        raise OSError(f"{path} must hold 1 to {MOST_BYTES} bytes, got the shape {shape}")
    if len(values) != count:
        raise OSError(f"{path} must hold {count} values by its header, got {len(values)}")
    return np.frombuffer(values, np.uint8).reshape(shape)
