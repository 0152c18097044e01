"""encode() and assign() as functions: errors, the choice of backend, and what counts as an argument."""

import math
import os
import subprocess
import sys
import threading

import pytest
import torch

import ctxenc
from ctxenc.kernels import backends, reference, torch_encode

FUNCTIONS = (ctxenc.encode, ctxenc.assign)
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)


def arguments(**changed):
    given = {"x": torch.randn(2, 6, 5), "codewords": torch.randn(4, 6), "smoothing": torch.rand(4)}
    return given | changed


@pytest.fixture
def nothing_computed(monkeypatch):
    """No tensor may be made before an error: neither a path of the operator nor a factory is called."""

    def forbidden(*args, **kwargs):
        pytest.fail("the error comes too late")

    for name in ("encode", "encode_plainly", "assign"):
        monkeypatch.setattr(torch_encode, name, forbidden)
    for name in ("full", "empty", "zeros", "tensor"):
        monkeypatch.setattr(torch, name, forbidden)


X = "(2, 6, 5)"
WRONG = [
    ({"x": [1.0]}, TypeError, "x must be a tensor, got list"),
    ({"codewords": None}, TypeError, "codewords must be a tensor, got NoneType"),
    ({"smoothing": "0.5"}, TypeError, "smoothing must be a number or a tensor, got str"),
    ({"smoothing": True}, TypeError, "smoothing must be a number or a tensor, got bool"),
    ({"smoothing": None}, TypeError, "smoothing must be a number or a tensor, got NoneType"),
    ({"x": torch.ones(2, 6, 5, dtype=torch.int64)}, TypeError, "x must be float16, .*, got torch.int64"),
    ({"x": torch.ones(2, 6, 5, dtype=torch.bool)}, TypeError, "x must be float16, .*, got torch.bool"),
    ({"x": torch.ones(2, 6, 5, dtype=torch.complex64)}, TypeError, "x must be float16, .*, got torch.complex64"),
    ({"x": torch.ones(2, 6, 5).to(torch.float8_e4m3fn)}, TypeError, "x must be float16, .*, got torch.float8_e4m3fn"),
    ({"codewords": torch.ones(4, 6, dtype=torch.uint8)}, TypeError, "codewords must be float16, .*, got torch.uint8"),
    ({"smoothing": torch.ones(4, dtype=torch.int32)}, TypeError, "smoothing must be float16, .*, got torch.int32"),
    ({"codewords": torch.ones(4, 6, device="meta")}, ValueError, "codewords must be on the device of x, cpu, got meta"),
    ({"smoothing": torch.ones(4, device="meta")}, ValueError, "smoothing must be on the device of x, cpu, got meta"),
    ({"x": torch.ones(2, 6, 5, device="meta")}, ValueError, "codewords must be on the device of x, meta, got cpu"),
    ({"x": torch.ones(2, 6)}, ValueError, r"x must have shape \(B, D, \*spatial\) with .*, got \(2, 6\)"),
    ({"x": torch.ones(6)}, ValueError, r"x must have shape \(B, D, \*spatial\) with .*, got \(6,\)"),
    ({"x": torch.ones(())}, ValueError, r"x must have shape \(B, D, \*spatial\) with .*, got \(\)"),
    (
        {"codewords": torch.ones(16, 128)},
        ValueError,
        r"codewords must have shape \(K, 6\) to match x \(2, 6, 5\), got \(16, 128\)",
    ),
    ({"codewords": torch.ones(0, 6)}, ValueError, r"codewords must have shape \(K, 6\) to match x .*, got \(0, 6\)"),
    ({"codewords": torch.ones(6)}, ValueError, r"codewords must have shape \(K, 6\) to match x .*, got \(6,\)"),
    (
        {"codewords": torch.ones(1, 4, 6)},
        ValueError,
        r"codewords must have shape \(K, 6\) to match x .*, got \(1, 4, 6\)",
    ),
    ({"smoothing": torch.ones(5)}, ValueError, r"smoothing must have shape \(4,\), .* or \(\), .*, got \(5,\)"),
    ({"smoothing": torch.ones(1)}, ValueError, r"smoothing must have shape \(4,\), .* or \(\), .*, got \(1,\)"),
    ({"smoothing": torch.ones(4, 1)}, ValueError, r"smoothing must have shape \(4,\), .* or \(\), .*, got \(4, 1\)"),
    ({"x": torch.ones(2, 7, 5), "smoothing": 0.5}, ValueError, r"codewords must have shape \(K, 7\) .*, got \(4, 6\)"),
]


@each_function
@pytest.mark.parametrize(("changed", "error", "text"), WRONG, ids=[text[:40] for _, _, text in WRONG])
def test_an_error_names_argument_rule_and_value(function, changed, error, text, request):
    given = arguments(**changed)
    request.getfixturevalue("nothing_computed")
    with pytest.raises(error, match=rf"^{function.__name__}: {text}"):
        function(**given)


def test_the_sign_of_smoothing_is_not_checked():
    given = arguments(smoothing=-torch.rand(4))
    torch.testing.assert_close(ctxenc.encode(**given), reference.encode(**given), rtol=1e-4, atol=1e-5)
    assert ctxenc.encode(**arguments(smoothing=-0.5)).isfinite().all()


@each_function
@pytest.mark.parametrize("number", [0.5, 2, 0, -1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_number_is_one_factor_for_all(function, number, dtype):
    """In fp32 at least: in fp16, 1e6 would be infinite and 0.1 another number."""
    given = arguments(x=torch.randn(2, 6, 5).to(dtype), codewords=torch.randn(4, 6).to(dtype))
    factor = torch.tensor(float(number), dtype=torch.promote_types(dtype, torch.float32))
    got = function(**given | {"smoothing": number})
    assert torch.equal(got, function(**given | {"smoothing": factor}))
    assert got.isfinite().all()
    assert got.dtype == factor.dtype


@each_function
@pytest.mark.parametrize("spatial", [(12,), (3, 4), (2, 3, 2), (1, 2, 3, 2)])
def test_any_number_of_spatial_dimensions(function, spatial):
    given = arguments(x=torch.randn(2, 6, *spatial))
    flat = function(**given | {"x": given["x"].flatten(2)})
    if function is ctxenc.assign:
        flat = flat.unflatten(2, spatial)
    assert torch.equal(function(**given), flat)


@each_function
@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_result_is_fp32_at_least(function, x_dtype, dtype):
    got = function(torch.randn(2, 6, 5).to(x_dtype), torch.randn(4, 6).to(dtype), torch.rand(4).to(dtype))
    assert got.dtype == (torch.float64 if torch.float64 in (x_dtype, dtype) else torch.float32)


@each_function
def test_meta_tensors_give_shapes(function):
    given = {name: tensor.to("meta") for name, tensor in arguments().items()}
    assert function(**given).shape == ((2, 4, 6) if function is ctxenc.encode else (2, 4, 5))
    assert function(**given | {"smoothing": 0.5}).is_meta


@each_function
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_lowers_nothing(function, dtype):
    given = arguments()
    with torch.autocast("cpu", dtype):
        under = function(**given)
    assert torch.equal(under, function(**given))


# The choice of backend


def test_backend_names_are_checked_before_anything_else(nothing_computed):
    with pytest.raises(ValueError, match=r"^encode: backend must be one of auto, torch, triton, got 'cuda'"):
        ctxenc.encode(None, None, None, backend="cuda")
    with (
        pytest.raises(ValueError, match=r"^use_backend: backend must be one of auto, torch, triton, got None"),
        ctxenc.use_backend(None),
    ):
        pass


@pytest.mark.parametrize("size", [(7,), (3, 5), (2, 3, 2)])
def test_the_mean_over_the_pixels(size):
    given = arguments() | {"x": torch.randn(2, arguments()["codewords"].shape[1], *size)}
    torch.testing.assert_close(ctxenc.encode(**given, aggregation="mean"), ctxenc.encode(**given) / math.prod(size))
    with pytest.raises(ValueError, match=r"^encode: aggregation must be one of sum, mean, got 'max'"):
        ctxenc.encode(None, None, None, aggregation="max")


def test_explicit_triton_never_falls_back():
    """On CPU tensors, where no Triton path can run."""
    with pytest.raises(RuntimeError, match=r'^encode: backend="triton" cannot run: \w+'):
        ctxenc.encode(**arguments(), backend="triton")
    with ctxenc.use_backend("triton"), pytest.raises(RuntimeError, match=r"^encode: .*triton.* cannot run: "):
        ctxenc.encode(**arguments())


def test_torch_by_name_is_torch_whatever_auto_means():
    given = arguments()
    with ctxenc.use_backend("torch"):
        wanted = ctxenc.encode(**given)
    with ctxenc.use_backend("triton"):
        assert torch.equal(ctxenc.encode(**given, backend="torch"), wanted)
        assert ctxenc.assign(**given).shape == (2, 4, 5)  # which has the PyTorch path alone


def test_use_backend_nests_and_survives_errors():
    def fail_inside() -> None:
        with ctxenc.use_backend("triton"):
            assert backends.get_preferred() == "triton"
            raise KeyError

    with ctxenc.use_backend("torch"):
        assert backends.get_preferred() == "torch"
        with pytest.raises(KeyError):
            fail_inside()
        assert backends.get_preferred() == "torch"
        with pytest.raises(ValueError), ctxenc.use_backend("nonsense"):
            pass
        assert backends.get_preferred() == "torch"
        with ctxenc.use_backend("auto"):
            assert backends.get_preferred() == "auto"
        assert backends.get_preferred() == "torch"
    assert backends.get_preferred() == backends.DEFAULT


def test_use_backend_is_no_other_threads_business():
    """Two blocks that overlap in time, the first to begin the first to end: a global would stay on "triton" for good."""
    first, second, seen = threading.Event(), threading.Event(), []

    def begin_first() -> None:
        with ctxenc.use_backend("triton"):
            first.set()
            second.wait(10)
            seen.append(backends.get_preferred())

    thread = threading.Thread(target=begin_first)
    thread.start()
    first.wait(10)
    with ctxenc.use_backend("torch"):
        second.set()
        thread.join()
        assert backends.get_preferred() == "torch"
    assert seen == ["triton"]
    assert backends.get_preferred() == backends.DEFAULT
    assert ctxenc.encode(**arguments()).shape == (2, 4, 6)


def test_backend_info():
    with ctxenc.use_backend("auto"):
        info = ctxenc.backend_info()
        assert info == (info.backend, info.reason)
        assert info.backend == ("triton" if torch.cuda.is_available() else "torch")
        assert info.reason
        given = arguments()
        assert ctxenc.backend_info(given["x"], given["codewords"])[:1] == ("torch",)
        assert "x is on cpu" in ctxenc.backend_info(**given).reason
        with pytest.raises(ValueError, match=r"^backend_info: codewords must have shape \(K, 6\)"):
            ctxenc.backend_info(given["x"], given["codewords"].t())
    with ctxenc.use_backend("torch"):
        assert ctxenc.backend_info().backend == "torch"
        assert "use_backend" in ctxenc.backend_info().reason


def test_the_environment_variable():
    for value, wanted in {"torch": "torch", "auto": "auto", "": "auto", "triton": "triton"}.items():
        done = in_environment(value, "from ctxenc.kernels import backends; print(backends.get_preferred())")
        assert done.stdout.split() == [wanted], done.stderr


def test_a_wrong_environment_variable_is_told_at_the_first_use():
    done = in_environment("cuda", "import ctxenc; ctxenc.Encoding")
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last == (
        "ValueError: the environment variable CTXENC_BACKEND must be one of auto, torch, triton, got 'cuda'"
    )


def in_environment(value: str, code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CTXENC_BACKEND": value}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
