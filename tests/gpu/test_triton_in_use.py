"""The Triton path with what users put around it: streams, graphs, torch.compile, AMP, several GPUs; and the memory it takes."""

import copy
from collections import defaultdict

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

import ctxenc
from tests.gpu.problems import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    assert_near,
    assert_same_bits,
    features,
    on_a_gpu,
    problem,
    run,
    triton,
)

pytestmark = on_a_gpu


def test_two_streams_at_once():
    """Long and short work side by side, a round after the other, with nothing that orders the two streams."""
    problems = [problem(8, 3600, 512, 32, dtype=torch.bfloat16), problem(64, 196, 64, 16, dtype=torch.bfloat16, seed=1)]
    wanted = [run(arguments) for arguments in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    got = []
    for _ in range(10):
        for stream, arguments, results in zip(streams, problems, wanted, strict=True):
            with torch.cuda.stream(stream):
                got.append((run(arguments), results))
    torch.cuda.synchronize()
    for pair in got:
        assert_same_bits(*pair)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_captured_graph_takes_new_inputs(dtype, layout):
    static = problem(4, 784, 128, 16, dtype=dtype, layout=layout)
    fresh = [problem(4, 784, 128, 16, dtype=dtype, layout=layout, seed=seed) for seed in (1, 2, 3)]
    wanted = [run(arguments) for arguments in fresh]
    stream = torch.cuda.Stream()  # warm-up and capture on the same one, or autograd waits for the other
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = run(static)
    for arguments, expected in zip(fresh, wanted, strict=True):
        for old, new in zip(static, arguments, strict=True):
            old.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(results, expected)


def compiled_run(compiled, arguments) -> list[Tensor]:
    *tensors, grad = arguments
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    encoding = compiled(*leaves)
    return [encoding.detach(), *torch.autograd.grad(encoding, leaves, grad)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_it_gives_the_same_without_new_compilations(dtype, layout):
    """The second size makes the sizes dynamic; from the third on, in batch and pixels, no frame is compiled again."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(triton, fullgraph=True, backend=counter)
    for count, (B, N) in enumerate([(2, 196), (3, 49), (4, 50), (4, 784), (9, 225), (2, 3136)]):
        arguments = problem(B, N, 128, 16, dtype=dtype, layout=layout)
        assert_near(compiled_run(compiled, arguments), run(arguments), 1e-6)
        if count == 1:
            assert counter.frame_count <= 2
            after_two = counter.frame_count
    assert counter.frame_count == after_two


def test_the_block_compiles_without_a_break():
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = ctxenc.ContextEncoding(64, num_codes=16, rd_ratio=0.5).to(DEVICE)
    x = torch.randn(8, 64, 28, 28, device=DEVICE)
    with ctxenc.use_backend("triton"):
        compiled = torch.compile(copy.deepcopy(block), fullgraph=True)
        assert_near([compiled(x).detach()], [block(x).detach()], 1e-3)  # the convolution is in tf32


class Network(nn.Module):
    """Two convolutions with a block between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.block = ctxenc.ContextEncoding(64, num_codes=16, rd_ratio=0.5)
        self.conv = nn.Conv2d(64, 32, 3, 2, 1)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.block(self.stem(x))).relu().mean((2, 3)))


def flat(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in network.parameters()])


STEPS, SIZE = 3, 56


def train(backend: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Losses, and what training changed in all parameters."""
    torch.manual_seed(0)
    x, target = torch.randn(8, 3, SIZE, SIZE).to(DEVICE), torch.randint(10, (8,)).to(DEVICE)
    network = Network().to(DEVICE, memory_format=torch.channels_last)
    before = flat(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    # A scale that nothing overflows at, so that no step is left out.
    scaler = torch.amp.GradScaler(DEVICE, init_scale=256.0, enabled=dtype == torch.float16)
    losses = []
    with ctxenc.use_backend(backend):
        for _ in range(STEPS):
            optimizer.zero_grad()
            with torch.autocast(DEVICE, dtype):
                loss = F.cross_entropy(network(x), target)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
    if scaler.is_enabled():
        assert scaler.get_scale() == 256
    return torch.stack(losses), flat(network) - before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_under_autocast_is_that_of_the_pytorch_path(dtype):
    losses, changes = train("triton", dtype)
    wanted_losses, wanted_changes = train("torch", dtype)
    assert losses.isfinite().all()
    assert changes.isfinite().all()
    assert_near([losses], [wanted_losses], 0.01)
    assert (changes - wanted_changes).norm() < 0.05 * wanted_changes.norm()


def test_new_sizes_compile_two_variants_at_most(monkeypatch):
    """One where rows begin at multiples of 16 bytes, one where they do not; D and K are such that no other test compiled them."""
    knobs = pytest.importorskip("triton.knobs", reason="this Triton has no hook that tells of compilations")
    if not hasattr(knobs.runtime, "jit_post_compile_hook"):
        pytest.skip("this Triton has no hook that tells of compilations")
    compiled = defaultdict(set)

    def hook(*, key, fn, **_):
        compiled[str(fn.name)].add(str(key))

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", hook)
    for layout in LAYOUTS:
        compiled.clear()
        for B, N in [(2, 784), (16, 784), (7, 3136), (3, 3600), (2, 49), (5, 225), (33, 196), (1, 9409), (2, 65536)]:
            run(problem(B, N, 96, 24, dtype=torch.bfloat16, layout=layout))
        assert compiled, "the hook was never called"
        counts = {name: len(keys) for name, keys in compiled.items()}
        assert max(counts.values()) <= 2, f"compilations of each kernel: {counts}"


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_device_of_x_whatever_device_is_current():
    arguments = problem(4, 784, 128, 16, dtype=torch.bfloat16)
    moved = tuple(tensor.to("cuda:1") for tensor in arguments)
    assert torch.cuda.current_device() == 0
    assert_near([tensor.to(DEVICE) for tensor in run(moved)], run(arguments), 1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(16, 3600, 512, 32), (128, 784, 128, 16), (256, 3136, 16, 16)], ids=str)
def test_memory(shape, dtype, layout):
    """Above the inputs: a few B x K x D, the gradient in x, and a tenth of x for partial sums."""
    B, _, D, K = shape
    *tensors, grad = problem(*shape, dtype=dtype, layout=layout)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    x, small = tensors[0], 8 * 4 * B * K * D + 2**21
    run((*tensors, grad))  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    encoding = triton(*leaves)
    kept = torch.cuda.memory_allocated() - before
    gradients = torch.autograd.grad(encoding, leaves, grad)
    peak = torch.cuda.max_memory_allocated() - before
    del gradients
    assert kept <= small, f"{kept} bytes are kept for backward"
    bound = small + 1.1 * x.nbytes
    assert peak <= bound, f"{peak} bytes at the peak, {bound - small:.0f} + {small} allowed"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "side", "batch"), [(256, 56, 8), (1024, 14, 8), (2048, 7, 3)])
def test_a_fused_block_projects_and_encodes_in_one_kernel(channels, side, batch, dtype, layout):
    torch.manual_seed(0)
    block = ctxenc.ContextEncoding(channels, num_codes=16)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    block = block.to(DEVICE, dtype, memory_format=memory_format).eval().fuse()
    x = torch.randn(batch, channels, side, side).to(DEVICE, dtype, memory_format=memory_format)
    with torch.no_grad(), ctxenc.use_backend("triton"):
        assert block._can_fuse_projection(x)
        got = block(x)
        encoding = block._encode(x)
        in_steps = block.encoding(block.act(block.conv(x)))
    assert got.stride() == x.stride()
    assert_near([encoding], [in_steps], 2e-2)  # the convolution rounds before it adds the bias


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(8, 256, 3136), (3, 100, 49)], ids=str)
def test_the_gate(shape, dtype, layout, residual):
    from ctxenc.kernels.fused import gate as triton_gate  # not at the top: tests are collected where Triton is not

    generator = torch.Generator(DEVICE).manual_seed(0)
    x, dy = (features(*shape, layout, dtype, generator) for _ in range(2))
    logits = torch.randn(shape[:2], device=DEVICE, dtype=dtype, generator=generator)

    def results(gate, *leaves: Tensor) -> list[Tensor]:
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        y = gate(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]

    def plain(x: Tensor, logits: Tensor) -> Tensor:
        gated = x * logits.sigmoid()[..., None]
        return (x + gated).relu() if residual else gated

    got = results(lambda x, logits: triton_gate.gate(x, logits, residual), x, logits)
    exact = results(plain, x.double(), logits.double())
    assert [tensor.dtype for tensor in got] == [dtype] * 3
    assert got[0].stride() == got[1].stride() == x.stride()
    assert_near([tensor.double() for tensor in got], exact, 4 * torch.finfo(dtype).eps)
