"""A fine-tuning that takes a second, and what two of them must have in common."""

import gzip
import pickle

import numpy as np
from PIL import Image

from ctxenc.training.checkpoint import read_rows

DATA_CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "crop_mode": "center",
}
SMALL = ("--model", "test_efficientnet", "--image-size", "32", "--batch-size", "2")
SMALL += ("--device", "cpu", "--threads", "1")


# Everything that draws numbers, and everything that has a state.
RANDOM = (
    *("--smoothing", "sampled", "--mixup", "0.4", "--cutmix", "0.5", "--random-erase", "0.3", "--model-ema"),
    *("--model-kwargs", '{"drop_rate": 0.3, "drop_path_rate": 0.2}', "--arms", "both", "--epochs", "3"),
)
SEGMENT = (
    *("--backbone", "test_resnet", "--channels", "16", "--num-codes", "4", "--epochs", "2", "--batch-size", "2"),
    *("--base-size", "40", "--crop-size", "32", "--threads", "1", "--device", "cpu"),
)


def metrics(arm):
    """The rows of an arm."""
    return read_rows(arm / "metrics.csv")


def checkpoints(arm):
    """The names of an arm's checkpoints."""
    return sorted(path.name for path in (arm / "checkpoints").iterdir())


def make_pairs(root):
    """Six images of two classes, the left and the right half, of several sizes, with names for the classes."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "masks"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            height, width = 30 + 4 * number, 44
            pixels = generator.integers(0, 80, (height, width, 3), dtype=np.uint8)
            pixels[:, width // 2 :] += 120
            mask = np.zeros((height, width), np.uint8)
            mask[:, width // 2 :] = 1
            mask[0] = 255
            Image.fromarray(pixels).save(root / "images" / split / f"{number}.png")
            Image.fromarray(mask).save(root / "masks" / split / f"{number}.png")
    (root / "classes.txt").write_text("dark\nlight\n")
    return root


def make_cifar(root):
    """CIFAR-10's files with four images each; their checksums are not those of the real ones."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        pixels = generator.integers(256, size=(4, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": pixels, "labels": [0, 1, 2, 9]}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {number}" for number in range(10)]}))
    return root


def make_fashion(folder, zipped):
    """Fashion-MNIST's four files with 20 images to train on and 10 to test on; image i is all i, its label i % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", 20), ("t10k", 10)):
        images = np.repeat(np.arange(count, dtype=np.uint8), 28 * 28).reshape(count, 28, 28)
        for name, values in (
            (f"{prefix}-images-idx3-ubyte", images),
            (f"{prefix}-labels-idx1-ubyte", images[:, 0, 0] % 10),
        ):
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            content = header + values.tobytes()
            (folder / f"{name}{'.gz' if zipped else ''}").write_bytes(gzip.compress(content) if zipped else content)
    return folder


def assert_same_run(one, other, arms):
    for arm in arms:
        for name in ("metrics.csv", "last.safetensors", "best.safetensors", "predictions.csv", "codebooks.csv"):
            if (one / arm / name).exists() or name != "codebooks.csv":  # SE networks have none
                assert (one / arm / name).read_bytes() == (other / arm / name).read_bytes(), (arm, name)
