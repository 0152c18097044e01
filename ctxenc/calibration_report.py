"""What calibrate() reports."""

from dataclasses import dataclass

from torch import Tensor, cat


@dataclass(frozen=True)
class BlockCalibration:
    """How well a block's gate follows that of the SE block on the held-out images.

    Attributes:
        name: qualified name in the model.
        gate_r2: 1 - sum (gate - SE gate)^2 / sum (SE gate - its mean over the images, channel by channel)^2; None where the SE
            gate is the same for all images, as in a slot that was empty.
        codewords_used: codewords to which some pixel is assigned more than to any other.
        num_codes: K.
    """

    name: str
    gate_r2: float | None
    codewords_used: int
    num_codes: int


@dataclass(frozen=True)
class Calibration:
    """What calibrate() reports. All but `fitted` is about the held-out images.

    Attributes:
        start: "calibrated", "neutral" or "random".
        fitted: number of images that the blocks were fitted to.
        held_out: number of images that were measured.
        blocks: a record a block, in the order of execution.
        agreement: share of predicted classes that are those of the original network; None where its output is no (B, classes, ...).
        kl: Kullback-Leibler divergence of the predicted classes from the original network's, in nats, a mean; None likewise.
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


def compared(output: Tensor, original: Tensor) -> tuple[Tensor, Tensor]:
    """Of each prediction (the mean over those of an image): is it the original's, and its divergence from that."""
    same = (output.argmax(1) == original.argmax(1)).double()
    own, wanted = (each.double().log_softmax(1) for each in (output, original))
    divergence = (wanted.exp() * (wanted - own)).sum(1)
    return same.reshape(len(same), -1).mean(1), divergence.reshape(len(same), -1).mean(1)


def gate_r2(gates: list[tuple[Tensor, Tensor]]) -> float | None:
    """R^2 of pairs of own and wanted gates (B, C), as BlockCalibration has it."""
    if not gates:
        return None
    own, wanted = (cat(each).double() for each in zip(*gates, strict=True))
    spread = (wanted - wanted.mean(0)).square().sum()
    return float(1 - (wanted - own).square().sum() / spread) if spread > 1e-12 * wanted.numel() else None
