"""The specification of the operator: the residual form as the papers write it, eager, in any dtype, to any order.

It makes a tensor of B x N x K x D, so it is for checking, never for use. Deep TEN (arXiv 1612.02844), section 3, equations 1-2.
"""

import torch
from torch import Tensor


def residuals(x: Tensor, codewords: Tensor) -> Tensor:
    """Return the residuals r_ik = x_i - d_k.

    Args:
        x: features (B, D, N).
        codewords: (K, D).

    Returns:
        (B, N, K, D).
    """
    return x.transpose(1, 2).unsqueeze(2) - codewords


def assign(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """Return the soft assignment w_ik = softmax over k of -s_k |r_ik|^2.

    Args:
        x: features (B, D, N).
        codewords: (K, D).
        smoothing: (K,), or () for one factor shared by all codewords.

    Returns:
        (B, K, N); sums to one over K.
    """
    distance = residuals(x, codewords).square().sum(3)
    return torch.softmax(-smoothing * distance, dim=2).transpose(1, 2)


def encode(x: Tensor, codewords: Tensor, smoothing: Tensor) -> Tensor:
    """Return the encoding e_k = sum over i of w_ik r_ik.

    Args:
        x: features (B, D, N).
        codewords: (K, D).
        smoothing: (K,), or () for one factor shared by all codewords.

    Returns:
        (B, K, D).
    """
    weights = assign(x, codewords, smoothing).transpose(1, 2)
    return (weights.unsqueeze(3) * residuals(x, codewords)).sum(1)
