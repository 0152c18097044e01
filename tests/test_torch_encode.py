"""What only the PyTorch path has: the two functions that the fused path falls back to."""

import pytest
import torch

from ctxenc.kernels import torch_encode
from tests.test_operator import LAYOUTS, lay_out


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_fused_path_falls_back_to(layout, shared, dtype):
    """The same as encode() and its backward, with no graph; the gradient of x is dense, channels last where x is."""
    x = lay_out(torch.randn(2, 6, 4, 5), layout).flatten(2).to(dtype)
    codewords, smoothing = torch.randn(3, 6), torch.rand(() if shared else (3,))
    leaves = [tensor.detach().requires_grad_() for tensor in (x, codewords, smoothing)]
    encoding, weight_sum = torch_encode.forward_with_weight_sum(*leaves)
    assert not encoding.requires_grad
    wanted = torch_encode.encode(*leaves)
    torch.testing.assert_close(encoding, wanted.detach())
    torch.testing.assert_close(weight_sum, torch_encode.assign(x, codewords, smoothing).sum(2))
    grad = torch.randn_like(encoding)
    got = torch_encode.gradients(grad, *leaves, True)
    for one, other in zip(got, torch.autograd.grad(wanted, leaves, grad), strict=True):
        torch.testing.assert_close(one, other)
        assert not one.requires_grad
    dense = got[0].mT if x.stride(1) == 1 else got[0]
    assert dense.is_contiguous()
    nothing, *others = torch_encode.gradients(grad, *leaves, False)
    assert nothing.shape == (0,)
    assert nothing.dtype == dtype
    for one, other in zip(others, got[1:], strict=True):
        torch.testing.assert_close(one, other)
