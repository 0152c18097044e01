"""Define the proof of the encode kernels: their constants, problems that expose a lost term, and the error bounds.

The tolerance in tests/tolerance.py bounds the error for any input. Here the inputs are known, so the bound can be tight: in the
Euclidean norm over channels, each row of a result may be off by some units of round-off of the sum of the row's absolute terms (for
the encoding of a codeword, sum_i w_ik |r_ik|).
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ctxenc.kernels import torch_encode
from ctxenc.kernels.fused.launch import choose_precision, make_key, make_plan, make_readable
from ctxenc.kernels.fused.tiles import LONGEST_RUN, describe_gpu, estimate_partial_cost
from ctxenc.kernels.verdicts import Arguments, Constants, describe_placement

PRODUCTS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float16}  # tf32 has fp16's unit
LARGEST = 2**23  # elements of x or the weights in a problem, beyond three images: an fp64 copy takes 64 MB
AXES = {"encoding": 2, "dx": 1, "dcodewords": 1}  # axis of a result's channels
# Allowed error in units of the products' dtype, keyed by half precision: for dx, where errors do not average out, and for sums
# over pixels. In the interpreter a right kernel takes at most a quarter of it, one without the low-order operand 2.6 times.
UNITS = {True: (4.0, 0.5), False: (64.0, 64.0)}


def name_dtype(dtype: torch.dtype) -> str:
    """Return the dtype's name, for getattr(torch, name)."""
    return str(dtype).removeprefix("torch.")


def describe(direction: str, x: Tensor, codewords: Tensor, smoothing: Tensor) -> Constants:
    """Return everything that the kernels of a direction are compiled for, on x (B, channels, N)."""
    key = make_key(direction, make_readable(x), codewords, smoothing)
    return {
        "x": name_dtype(x.dtype),
        "codewords": name_dtype(codewords.dtype),
        "smoothing": name_dtype(smoothing.dtype),
        "D": key.D,
        "K": key.K,
        "shared": key.shared,
        "layout": key.layout,
        "vector": key.vector,
        "products": key.dot,
        **make_plan(key, x.device).tiles._asdict(),
    }


def key_call(x: Tensor, codewords: Tensor, smoothing: Tensor, mean: bool = False) -> tuple[Any, ...]:
    """Return everything that `describe` depends on. A mean takes the same binary with another divisor."""
    setting = choose_precision(x.dtype) if x.dtype == torch.float32 else None
    return *describe_placement(x), codewords.shape, codewords.dtype, smoothing.dtype, smoothing.dim(), setting


def describe_forward(x: Tensor, codewords: Tensor, smoothing: Tensor, mean: bool = False) -> Constants | None:
    """Return the constants of encode_forward."""
    return describe("forward", x, codewords, smoothing) if x.numel() else None


def describe_backward(
    _grad: Any, x: Tensor, codewords: Tensor, smoothing: Tensor, _weight_sum: Any, x_wanted: bool, mean: bool = False
) -> Constants | None:
    """Return the constants of encode_backward."""
    if not x.numel():
        return None
    direction = "backward" if x_wanted else "backward without dx"
    return {**describe(direction, x, codewords, smoothing), "x_wanted": x_wanted}


def place_tensors(
    B: int, C: int, sizes: range, channels_last: bool, dtype: torch.dtype, device: torch.device
) -> Iterator[Tensor]:
    """Return empty tensors (B, C, N) of one layout, some sizes N and every alignment: with distinct images, then one repeated."""
    room = torch.empty(B * C * max(sizes) + 8, dtype=dtype, device=device)
    for images in (B, 1):
        for skip in (0, 1, 2, 4):
            for N in sizes:
                x = room[skip : skip + images * C * N]
                x = x.view(images, N, C).transpose(1, 2) if channels_last else x.view(images, C, N)
                yield x.expand(B, C, N)


def make_candidates(constants: Constants, channels: int, device: torch.device, one_image: bool) -> Iterator[Tensor]:
    """Return empty features for a problem; every image has some full tiles and a partial one.

    There are as many images as multiprocessors, within LARGEST, so a program gets several tiles. Or there is one image, with so
    many tiles that programs share it at any cost of their sums.
    """
    block_n, K = int(constants["block_n"]), int(constants["K"])
    dtype = getattr(torch, str(constants["x"]))
    N, images = (9 + estimate_partial_cost(K, block_n, dtype.itemsize) // 50) * block_n, 1
    if not one_image:
        N = 7 * block_n
        images = max(3, min(describe_gpu(device).multiprocessors, LARGEST // (N * max(channels, K))))
    sizes = range(LONGEST_RUN - 17, LONGEST_RUN) if constants["layout"] == "run" else range(N + 1, N + 17)
    return place_tensors(images, channels, sizes, constants["layout"] == "last", dtype, device)


def fill(x: Tensor, values: Callable[[torch.Size], Tensor]) -> None:
    """Write values of a shape to x, which may repeat one image."""
    image = x[:1] if x.stride(0) == 0 else x
    image.copy_(values(image.shape))


def seed_draws(device: torch.device, seed: int = 0) -> dict[str, Any]:
    """Return the torch.rand arguments (beside a shape) that repeat the draw at every call, under any torch default dtype."""
    return {"generator": torch.Generator(device).manual_seed(seed), "device": device, "dtype": torch.float32}


def _make_problem(
    constants: Constants, device: torch.device, constants_of: Callable[..., Constants | None], one_image: bool = False
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Place pixels and codewords on a line in every other channel, scattered in the others; every channel lies off the origin.

    On a line, the rounding losses of all channels add up. Codewords lie in pairs about the first, their centre. Their distances
    round badly: each loses almost half a unit in the dtype of the products. Offsets are 12 times the largest distance, within the
    range that half precision multiplies without a shift, and far larger in every eighth channel.
    """
    D, K, products = int(constants["D"]), int(constants["K"]), PRODUCTS.get(str(constants["products"]), torch.float32)
    draw, channel = seed_draws(device), torch.arange(D, device=device)
    size, on_line, sign = 2.0 ** -round(math.log2(D) / 2), channel % 2 == 0, torch.randint(0, 2, (D,), **draw) * 2.0 - 1
    offset = sign * torch.where(channel % 8 == 7, 1000.0 if products == torch.float32 else 100.0, 12.0)
    mantissa, exponent = torch.frexp(torch.linspace(1, 0.1, -(-K // 2), device=device, dtype=torch.float32))
    unit = torch.finfo(products).eps / 2
    distance = torch.ldexp(((mantissa / unit).floor() + 0.45) * unit, exponent)[:, None]
    away = torch.where(on_line, distance * sign, torch.rand(len(distance), D, **draw))
    codewords = torch.cat(
        [torch.zeros(1, D, device=device, dtype=torch.float32), torch.stack([away, -away], 1).flatten(0, 1)]
    )[:K]
    codewords = ((codewords + offset) * size).to(getattr(torch, str(constants["codewords"])))
    smoothing = 6 * (torch.rand(() if constants["shared"] else (K,), **draw) + 0.5)
    smoothing = smoothing.to(getattr(torch, str(constants["smoothing"])))

    def draw_features(shape: torch.Size) -> Tensor:
        pixels = 2 * torch.rand(shape[0], 1, shape[2], **draw) - 1
        scattered = 2 * torch.rand(shape, **draw) - 1
        return (torch.where(on_line[:, None], pixels * sign[:, None], scattered) + offset[:, None]) * size

    for x in make_candidates(constants, D, device, one_image):
        if constants_of(x, codewords, smoothing) == constants:
            fill(x, draw_features)
            return x, codewords, smoothing
    return None


def make_forward_problems(constants: Constants, device: torch.device) -> list[Arguments]:
    """Make arguments of encode_forward: many images, for their means, and one image whose sums several programs add up."""
    problems = [
        (_make_problem(constants, device, describe_forward, one_image), not one_image) for one_image in (False, True)
    ]
    return [(*problem, mean) for problem, mean in problems if problem is not None]


def make_backward_problems(constants: Constants, device: torch.device) -> list[Arguments]:
    """Make arguments of encode_backward, for means; the incoming gradients lie along the line, too."""
    x_wanted = bool(constants["x_wanted"])
    problem = _make_problem(constants, device, lambda x, d, s: describe_backward(None, x, d, s, None, x_wanted))
    if problem is None:
        return []
    x, codewords, smoothing = (tensor.double() for tensor in problem)
    weight_sum, draw = torch_encode.assign(x, codewords, smoothing).sum(2).float(), seed_draws(device, seed=1)
    K, D = codewords.shape
    line = torch.where(torch.arange(D, device=device) % 2 == 0, (codewords[-1] - codewords[0]).sign().float(), 0.0)
    grad = torch.randn(len(x), K, 1, **draw) * line + 0.3 * torch.randn(len(x), K, D, **draw)
    pixels = x.shape[2]
    return [(grad * pixels, *problem, weight_sum / pixels, x_wanted, True)]


def _sum_absolute_terms(grad: Tensor, x: Tensor, codewords: Tensor, smoothing: Tensor) -> dict[str, Tensor]:
    """Return the sum of the absolute terms of each row, for fp64 x (B, D, N) and grad (B, K, D)."""
    weights, center = torch_encode.assign(x, codewords, smoothing), codewords.mean(0)
    x, d, s = x - center[:, None], codewords - center, smoothing.abs().reshape(-1, 1)
    squares = x.square().sum(1, keepdim=True) + d.square().sum(1)[:, None]
    distance = (squares - 2 * torch.matmul(d, x)).clamp(min=0).sqrt()  # |r_ik|
    p = (torch.bmm(grad, x) - (grad * d).sum(2, keepdim=True)).abs()
    q = weights * (p + (weights * p).sum(1, keepdim=True))
    pulls = weights * grad.norm(dim=2, keepdim=True) + 2 * s * q * distance
    dsmoothing = (q * distance.square()).sum((0, 2))
    return {
        "encoding": (weights * distance).sum(2),
        "weight_sum": weights.sum(2),
        "dx": pulls.sum(1),
        "dcodewords": pulls.sum((0, 2)),
        "dsmoothing": dsmoothing if smoothing.dim() else dsmoothing.sum(),
    }


def find_largest(ratios: Tensor) -> float:
    """Return the largest ratio of error to tolerance; NaN counts as infinite."""
    return float(ratios.nan_to_num(float("inf")).max())


def measure_excess(
    names: tuple[str, ...], results: tuple[Tensor, ...], exact: tuple[Tensor, ...], grad: Tensor, *inputs: Tensor
) -> dict[str, float]:
    """Return error over tolerance by result name, for these x, codewords and smoothing."""
    products = PRODUCTS.get(choose_precision(inputs[0].dtype), torch.float32)
    of_pixels, of_sums = UNITS[products != torch.float32]
    of_sums *= 1.5 if inputs[0].shape[2] <= LONGEST_RUN else 1  # few pixels average less
    terms, over = _sum_absolute_terms(*(tensor.double() for tensor in (grad, *inputs))), {}
    for name, result, wanted in zip(names, results, exact, strict=True):
        if result.numel():
            error, size = result.double() - wanted, wanted
            if name in AXES:
                error, size = error.norm(dim=AXES[name]), size.norm(dim=AXES[name])
            tolerance = (of_pixels if name == "dx" else of_sums) * torch.finfo(products).eps / 2 * terms[name]
            tolerance += torch.finfo(result.dtype).eps * size.abs() + torch.finfo(torch.float32).tiny
            over[name] = find_largest(error.abs() / tolerance)
    return over


def measure_forward_excess(
    arguments: Arguments, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]
) -> dict[str, float]:
    """Check the results of encode_forward."""
    *inputs, mean = arguments
    count = inputs[0].shape[2] if mean else 1
    results, exact = (tuple(count * each for each in each_set) for each_set in (results, exact))
    return measure_excess(("encoding", "weight_sum"), results, exact, exact[0], *inputs)


def measure_backward_excess(
    arguments: Arguments, results: tuple[Tensor, ...], exact: tuple[Tensor, ...]
) -> dict[str, float]:
    """Check the results of encode_backward, for means."""
    grad, *inputs = arguments[:4]
    return measure_excess(("dx", "dcodewords", "dsmoothing"), results, exact, grad / inputs[0].shape[2], *inputs)
