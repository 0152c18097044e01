"""Start a ContextEncoding block from data, one part at a time: projection, codebook, norms, gate.

This module sees one block and its tensors; calibration.py handles networks and images.
"""

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctxenc.context import ContextEncoding
from ctxenc.functional import assign
from ctxenc.swap import se_classes

# Figures below are the mean R^2 of the gates on 64 held-out photographs, for mobilenetv3_small_050 and test_efficientnet fitted
# to 192. The bias of both norms: values of mean 0 and deviation 1 pass ReLU five times in six, so that most of the mean that SE
# uses comes through: 0.87 and 0.92. Biases of 2 gave 0.85 and 0.87.
BIAS = 1.0
# Pixels are assigned to K^0.9 codewords on average, 12 of 16. With biases of 2, K^0.75 (8 of 16) gave 0.81 and 0.83, K^0.9 0.85
# and 0.87. K^0.97 (15) adds another 0.03 and 0.01, but codewords that share all pixels have little of their own to learn from.
SHARING = 0.9
PENALTIES = [10 ** (exponent / 2) for exponent in range(-8, 9)]


def find_first_weight(se: nn.Module | None) -> Tensor | None:
    """Return the weight (C'', C) of the first layer of an SE block; None for an empty slot."""
    layer = None if se is None else se_classes.find_first_layer(se)
    return None if layer is None else layer.weight.flatten(1)


def find_centres(pixels: Tensor, num_codes: int, seed: int) -> Tensor:
    """Return the centres (K, C) of scikit-learn's MiniBatchKMeans of pixels (N, C).

    Raises:
        ValueError: There are fewer pixels than codewords.
    """
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    if len(pixels) < num_codes:
        raise ValueError(f"images must give each block a pixel a codeword, got {len(pixels)} for {num_codes} codewords")
    kmeans = MiniBatchKMeans(num_codes, random_state=seed, n_init=3, batch_size=max(1024, 4 * num_codes))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # fewer distinct pixels than codewords: some centres are equal
        kmeans.fit(pixels.cpu().numpy())
    return torch.from_numpy(kmeans.cluster_centers_).to(pixels)


def find_smoothing(pixels: Tensor, codewords: Tensor, sharing: float) -> float:
    """Find the smoothing that assigns pixels (N, C) on average to K^sharing codewords: one if sharing is 0, all K if it is 1.

    The number for a pixel is exp(entropy of its weights). Its average, taken as a logarithm, falls as the smoothing grows.
    """
    target = sharing * math.log(len(codewords))
    scale = float((pixels - pixels.mean(0)).square().sum(1).mean())
    if scale < 1e-6:  # a constant map, as behind a norm of weight 0: any value works
        return 1.0
    low, high = 1e-6, 1e6  # in units of 1 / the variance
    for _ in range(40):
        middle = math.sqrt(low * high)
        weights = assign(pixels.mT[None], codewords, middle / scale)  # (1, K, N)
        low, high = (middle, high) if torch.special.entr(weights).sum(1).mean() > target else (low, middle)
    return math.sqrt(low * high) / scale


def _find_principal_rows(centred: Tensor, number: int) -> Tensor:
    """Return the directions (number, C) of most variance in centred samples (N, C)."""
    _, directions = torch.linalg.eigh(centred.mT @ centred)  # columns, the least variance first
    return directions.flip(1)[:, :number].mT


def find_projection_rows(first: Tensor | None, pixels: list[Tensor], number: int) -> Tensor:
    """Return rows (number, C) of the projection that pass on the SE block's features.

    Take the rows of the SE block's first layer; principal components instead gave a mean R^2 of 0.75, not 0.87, in the
    measurement above. Of too many rows, take the combinations with the most variance over images. Fill up too few with
    principal components of the rest of the pixels.

    Args:
        first: weight (C'', C) of that layer; None for an empty slot.
        pixels: pixels of the block's input, (B, N, C) per batch.
        number: C'. If it exceeds C, fewer rows come out.
    """
    together = torch.cat([batch.flatten(0, 1) for batch in pixels])
    first = together.new_zeros(0, together.shape[1]) if first is None else first.to(together)
    if len(first) > number:
        means = torch.cat([batch.mean(1) for batch in pixels])  # (n, C), the input of the SE block's layers
        return _find_principal_rows((means - means.mean(0)) @ first.mT, number) @ first
    if len(first) < number:
        basis, _ = torch.linalg.qr(first.mT)
        rest = together - together.mean(0)
        rest -= rest @ basis @ basis.mT
        return torch.cat([first, _find_principal_rows(rest, number - len(first))])
    return first


def _start_norm(norm: Any, mean: Tensor, variance: Tensor) -> None:
    norm.running_mean.copy_(mean)
    norm.running_var.copy_(variance)
    norm.weight.fill_(1)
    norm.bias.fill_(BIAS)


def start_codebook(block: ContextEncoding, pixels: list[Tensor], first: Tensor | None, seed: int) -> None:
    """Start the projection, its norm, the codewords and the smoothing from pixels (B, N, C) of the block's input, one tensor
    per batch.

    The projection's rows keep their length, so that a learning rate means the same. A smoothing that is not learned stays: the
    norm's weights and the codewords are scaled instead, to the same assignment.
    """
    norm: Any = block.norm
    rows = F.normalize(find_projection_rows(first, pixels, block.rd_channels), dim=1)
    weight = block.conv.weight.flatten(1)
    rows = torch.cat([rows * weight.norm(dim=1).mean(), weight[len(rows) :]])
    block.conv.weight.copy_(rows[:, :, None, None])
    projected = torch.cat([batch.flatten(0, 1) for batch in pixels]) @ rows.mT  # (N, C')
    _start_norm(norm, projected.mean(0), projected.var(0))
    features = block.act(norm(projected[:, :, None, None])).flatten(1)
    codewords = find_centres(features, block.num_codes, seed)
    smoothing = find_smoothing(features, codewords, SHARING)
    if block.smoothing == "learned":
        block.encoding.smoothing.fill_(smoothing)
    else:
        scale = math.sqrt(smoothing / float(block.encoding.smoothing))
        norm.weight.mul_(scale)
        norm.bias.mul_(scale)
        codewords *= scale
    block.encoding.codewords.copy_(codewords)


def fit_gate(block: ContextEncoding, encodings: Tensor, logits: Tensor) -> None:
    """Start the norm over the codewords from encodings (n, K, C'), and the linear layer by ridge regression onto logits (n, C).

    Use scikit-learn's RidgeCV: primal or dual, whichever is smaller, with the penalty of PENALTIES of least leave-one-out
    error.
    """
    from sklearn.linear_model import RidgeCV

    if block.pool == "mean":
        _start_norm(block.norm_codes, encodings.mean((0, 2)), encodings.var((0, 2)))
    features = pool_encodings(block, encodings)
    mean, deviation = features.mean(0), features.std(0)
    deviation = torch.where(deviation > 0, deviation, 1)
    ridge = RidgeCV([penalty * len(features) for penalty in PENALTIES])
    ridge.fit(
        *(each.double().cpu().numpy() for each in ((features - mean) / deviation, clamp_logits(block.gate, logits)))
    )
    weight = torch.from_numpy(ridge.coef_).to(features) / deviation  # (C, features)
    block.fc.weight.copy_(weight)
    block.fc.bias.copy_(torch.from_numpy(ridge.intercept_).to(features) - weight @ mean)


def pool_encodings(block: ContextEncoding, encodings: Tensor) -> Tensor:
    """Return the block's features of encodings (n, K, C'), as in ContextEncoding.features."""
    if block.pool == "mean":
        return block.norm_codes(encodings.unsqueeze(3)).squeeze(3).relu().mean(1)
    return F.normalize(encodings.flatten(1), dim=1)


def set_neutral_gate(block: ContextEncoding, logits: Tensor) -> None:
    """Set the gate to the mean gate of logits (n, C) per channel, for any image."""
    mean = block.gate(logits.clone()).mean(0)  # a gate may work in place
    block.fc.weight.zero_()
    block.fc.bias.copy_(_invert_gate(block.gate, mean, logits.amin(0), logits.amax(0)))


def _invert_gate(gate: nn.Module, values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Invert a monotone gate by bisection: find the logits between low and high that give the wanted values."""
    falls = gate(low.clone()) > gate(high.clone())
    for _ in range(40):
        middle = (low + high) / 2
        over = (gate(middle.clone()) > values) ^ falls
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return (low + high) / 2


def clamp_logits(gate: nn.Module, logits: Tensor) -> Tensor:
    """Clamp the logits: beyond the limits the gate moves by less than a hundredth of its range.

    Least squares also count the logits of a shut or fully open gate: a few images with logits of 50 took the held-out R^2 of a
    hard sigmoid's gate from 0.78 to -0.44.
    """
    low, high = logits.amin(), logits.amax()
    first, last = gate(low.clone()), gate(high.clone())
    margin = (last - first) / 100
    ends = [_invert_gate(gate, value, low, high) for value in (first + margin, last - margin)]
    return logits.clamp(*ends)
