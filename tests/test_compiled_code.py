"""Read compiled kernels, for GPUs that need not be there: the width of loads, and the order of loads and products."""

import re
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from benchmarks import compiled  # noqa: E402
from benchmarks.gpus import GPUS  # noqa: E402
from ctxenc.kernels.fused import gate  # noqa: E402

pytestmark = pytest.mark.skipif(
    not isinstance(gate.gate_fwd_kernel, JITFunction), reason="the interpreter compiles nothing"
)
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_compiled: dict[str, str] = {}


def ptx(kernel: JITFunction, arguments: dict[str, Any], options: dict[str, Any], arch: int) -> str:
    """The kernel specialised as Triton's own launcher would."""
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value, name = arguments[parameter.name], parameter.name
        if parameter.is_constexpr:
            signature[name], constants[(parameter.num,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            if not parameter.do_not_specialize_on_alignment and value.data_ptr() % 16 == 0:
                attributes[(parameter.num,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    made = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    key = str((kernel.fn.__name__, signature, constants, attributes, options, arch))
    if key not in _compiled:
        _compiled[key] = triton.compile(made, target=GPUTarget("cuda", arch, 32), options=options).asm["ptx"]
    return _compiled[key]


def accesses(direction: str, x: Tensor, dy: Tensor, arch: int) -> Counter[str]:
    """How often the kernel of a direction loads and stores, by the width in PTX."""
    found: Counter[str] = Counter()

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        found.update(re.findall(r"(?:ld|st)\.global\S*\.(?:v\d\.)?b\d+", ptx(kernel, named, options, arch)))

    logits = torch.empty(x.shape[:2], dtype=x.dtype)
    with mock.patch.object(JITFunction, "run", record):
        if direction == "forward":
            gate._forward(x, logits, True)
        else:
            gate._backward(dy, x, logits, True, True)
    return found


def features(C: int, N: int, dtype: torch.dtype, *, layout: str = "channels_first", offset: int = 0) -> Tensor:
    """Of 64 images, whose first element lies `offset` elements behind a multiple of 16 bytes."""
    flat = torch.empty(64 * C * N + 16, dtype=dtype)
    start = -flat.data_ptr() % 16 // dtype.itemsize + offset
    flat = flat[start : start + 64 * C * N]
    return flat.view(64, N, C).transpose(1, 2) if layout == "channels_last" else flat.view(64, C, N)


each_chip = pytest.mark.parametrize("arch", [80, 90])
each_direction = pytest.mark.parametrize(("direction", "loads", "stores"), [("forward", 4, 4), ("backward", 4, 2)])


@each_chip
@each_direction
@pytest.mark.parametrize("layout", ["channels_first", "channels_last"])
@pytest.mark.parametrize(
    ("dtype", "C", "N"), [(torch.bfloat16, 1024, 196), (torch.float16, 2048, 49), (torch.float32, 1024, 196)], ids=str
)
def test_16_bytes_at_a_time(dtype, C, N, layout, direction, loads, stores, arch):
    """All of x, dy, y and dx: what is left are the logits, of which a program has 64, and their gradient."""
    x, dy = (features(C, N, dtype, layout=layout) for _ in range(2))
    found = accesses(direction, x, dy, arch)
    assert found["ld.global.v4.b32"] == loads
    assert found["st.global.v4.b32"] == stores
    narrow = "b32" if dtype == torch.float32 else "b16"
    assert set(found) <= {"ld.global.v4.b32", "st.global.v4.b32", f"ld.global.{narrow}", f"st.global.{narrow}"}
    assert found[f"ld.global.{narrow}"] <= 9
    assert found[f"st.global.{narrow}"] == (direction == "backward")


@each_direction
@pytest.mark.parametrize(("x_offset", "dy_offset"), [(1, 0), (0, 4), (4, 4)])
def test_one_element_at_a_time_from_an_address_that_is_not_aligned(x_offset, dy_offset, direction, loads, stores):
    x, dy = (features(1024, 196, torch.bfloat16, offset=offset) for offset in (x_offset, dy_offset))
    found = accesses(direction, x, dy, 80)
    wide = direction == "forward" and not x_offset
    assert bool(found["ld.global.v4.b32"]) == bool(found["st.global.v4.b32"]) == wide


@each_direction
def test_new_sizes_take_the_same_binary(direction, loads, stores):
    for C, N in [(1024, 196), (2048, 49)]:
        x = features(C, N, torch.bfloat16)
        accesses(direction, x, x, 90)
    before = len(_compiled)
    for C, N in [(512, 784), (8, 15), (2048, 50), (16, 8)]:  # none of them in splits, whose sums are fp32
        x = features(C, N, torch.bfloat16)
        accesses(direction, x, x, 90)
    assert len(_compiled) == before


@each_chip
@pytest.mark.parametrize("K", [16, 32])
@pytest.mark.parametrize("D", [64, 256], ids=["narrow", "wide"])
@pytest.mark.parametrize("direction", ["forward", "backward", "project"])
def test_the_next_tile_is_asked_for_before_the_products_of_this_one(direction, D, K, arch):
    """In the loop over the tiles; kernels with a loop over blocks of channels keep copies of later blocks in flight."""
    gpu, seen = GPUS[f"sm_{arch}"], []
    channels = 512 if direction == "project" else D
    x = torch.empty(64, channels, 1024, dtype=torch.bfloat16, device="meta")
    for launch in compiled.launches(direction, x, K, gpu):
        if "p_x" not in launch.arguments:
            continue
        binary = compiled.compiled(launch, gpu)
        seen.append(launch.kernel.fn.__name__)
        if seen[-1] in ("assign_kernel", "project_encode_kernel"):
            in_flight = re.findall(r"cp\.async\.wait_group\s+(\d+)|(mma\.sync|wgmma\.mma_async)", binary.asm["ptx"])
            before = [count for count, product in in_flight[: [bool(product) for _, product in in_flight].index(True)]]
            assert int(before[-1]) > 0
            continue
        block_n, block_d = launch.arguments["BLOCK_N"], launch.arguments["BLOCK_D"]
        tile = rf"= tt\.load .*: tensor<{block_n}x{block_d}x!tt\.ptr<bf16>"
        product = r"= (?:ttng\.warp_group_dot|tt\.dot) "
        steps = [
            "load" if re.search(tile, line) else "product"
            for line in binary.asm["ttgir"].splitlines()
            if re.search(f"{tile}|{product}", line)
        ]
        # One load before the loop, one in it.
        assert steps[:3] == ["load", "load", "product"], steps
        assert steps.count("load") == 2
    main = {"forward": "encode_fwd_kernel", "backward": "encode_bwd_kernel", "project": "project_encode_kernel"}[
        direction
    ]
    assert seen == (["assign_kernel"] if D == 256 and direction != "project" else []) + [main]


@each_chip
@pytest.mark.parametrize(("N", "width"), [(49, 16), (196, 8), (3136, 16)])
@pytest.mark.parametrize("D", [64, 128], ids=["narrow", "wide"])
@pytest.mark.parametrize("direction", ["forward", "backward", "project"])
def test_half_precision_is_read_by_8_or_16_bytes(direction, D, N, width, arch):
    """Maps of 7x7 and 14x14, too, channels first: no value of x by itself."""
    gpu, channels = GPUS[f"sm_{arch}"], 512 if direction == "project" else D
    x = torch.empty(64, channels, N, dtype=torch.bfloat16, device="meta")
    read = [each for each in compiled.launches(direction, x, 16, gpu) if "p_x" in each.arguments]
    assert len(read) == (2 if D == 128 and direction != "project" else 1)
    for launch in read:
        assert launch.arguments["VECTOR"] * 2 == width
        ptx = compiled.compiled(launch, gpu).asm["ptx"]
        assert not re.findall(r"ld\.global\S*\.[bu]16|cp\.async\.\S+ .*, 0x?2,", ptx)
