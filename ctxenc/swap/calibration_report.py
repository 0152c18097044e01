"""The report of calibrate()."""

from dataclasses import dataclass

from torch import Tensor, cat


@dataclass(frozen=True)
class BlockCalibration:
    """Compare a block's gate with the SE block's gate on the held-out images.

    Attributes:
        name: qualified name in the model.
        gate_r2: 1 - sum (gate - SE gate)^2 / sum (SE gate - its mean over the images, channel by channel)^2; None if the SE
            gate is the same for all images, as in an empty slot.
        codewords_used: number of codewords that are the main assignment of some pixel.
        num_codes: K.
    """

    name: str
    gate_r2: float | None
    codewords_used: int
    num_codes: int


@dataclass(frozen=True)
class Calibration:
    """Hold the result of calibrate(). All but `fitted` is about the held-out images.

    Attributes:
        start: "calibrated", "neutral" or "random".
        fitted: number of images used for the fit.
        held_out: number of images measured.
        blocks: one record per block, in the order of execution.
        agreement: share of predicted classes equal to the original network's; None if its output is not (B, classes, ...).
        kl: mean Kullback-Leibler divergence of the predicted classes from the original network's, in nats; None likewise.
    """

    start: str
    fitted: int
    held_out: int
    blocks: tuple[BlockCalibration, ...]
    agreement: float | None
    kl: float | None

    def __str__(self) -> str:
        width = max(len(block.name) for block in self.blocks)
        lines = [f"{self.start} start, {self.fitted} images fitted, {self.held_out} held out"]
        lines.append(f"{'block':{width}}  R2 of gate  codewords used")
        for block in self.blocks:
            r2 = "constant" if block.gate_r2 is None else f"{block.gate_r2:.3f}"
            lines.append(f"{block.name:{width}}  {r2:>10}  {f'{block.codewords_used} of {block.num_codes}':>14}")
        if self.agreement is not None:
            lines.append(f"{100 * self.agreement:.1f} % predicted as by the original network, KL {self.kl:.4f}")
        return "\n".join(lines)


def compare_predictions(output: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each image the share of predictions that agree with the original, and their mean divergence."""
    same = (output.argmax(1) == original.argmax(1)).double()
    predicted, expected = (each.double().log_softmax(1) for each in (output, original))
    divergence = (expected.exp() * (expected - predicted)).sum(1)
    return same.reshape(len(same), -1).mean(1), divergence.reshape(len(same), -1).mean(1)


def compute_gate_r2(gates: list[tuple[Tensor, Tensor]]) -> float | None:
    """Return R^2 of pairs of own and wanted gates (B, C), as defined in BlockCalibration."""
    if not gates:
        return None
    predicted, expected = (cat(each).double() for each in zip(*gates, strict=True))
    variation = (expected - expected.mean(0)).square().sum()
    return (
        float(1 - (expected - predicted).square().sum() / variation) if variation > 1e-12 * expected.numel() else None
    )
