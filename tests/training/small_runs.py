"""A fine-tuning that takes a second, and what two of them must have in common."""

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


def metrics(arm):
    """The rows of an arm without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if key != "images_per_s"} for row in read_rows(arm / "metrics.csv")
    ]


def assert_same_run(one, other, arms):
    for arm in arms:
        for name in ("last.safetensors", "best.safetensors", "predictions.csv"):
            assert (one / arm / name).read_bytes() == (other / arm / name).read_bytes(), (arm, name)
        assert metrics(one / arm) == metrics(other / arm)
