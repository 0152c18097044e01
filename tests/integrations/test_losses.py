"""EncNet's loss, the presence of classes, and Dice: against torch, NumPy and numbers worked out by hand."""

import os
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import multiclass_f1_score

from ctxenc.integrations.losses import DiceLoss, EncNetLoss, presence

IGNORE = 255
MASKS = torch.tensor(
    [
        [[0, 0, 2], [2, 2, 255]],
        [[1, 255, 255], [255, 255, 255]],
        [[255, 255, 255], [255, 255, 255]],
    ]
)
PRESENT = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], dtype=torch.bool)
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX") or "g++", "g++", "clang++", "c++"))), reason="no C++ compiler"
)


def outputs_for(target, classes=4, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = {"out": (len(target), classes, *target.shape[1:]), "se": (len(target), classes)}
    shapes["aux"] = shapes["out"]
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def gradients(loss, outputs):
    return dict(zip(outputs, torch.autograd.grad(loss, list(outputs.values()), allow_unused=True), strict=True))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_presence(dtype):
    found = presence(MASKS.to(dtype), 4)
    assert found.dtype == torch.bool
    assert torch.equal(found, PRESENT)


def test_presence_against_a_loop():
    target = torch.randint(0, 30, (5, 9, 7), generator=torch.Generator().manual_seed(1))
    target[target > 20] = IGNORE
    wanted = np.array([[bool((mask == number).any()) for number in range(21)] for mask in target.numpy()])
    assert not wanted.all()
    np.testing.assert_array_equal(presence(target, 21).numpy(), wanted)


def test_presence_takes_any_integer_as_ignored():
    target = torch.tensor([[[0, 1, 156]]], dtype=torch.uint8)  # 156 is -100 in eight bits
    assert presence(target, 157, ignore_index=-100)[0].nonzero().flatten().tolist() == [0, 1, 156]
    assert presence(target.long() - 1, 156, ignore_index=-1)[0].nonzero().flatten().tolist() == [0, 155]
    assert presence(target, 157, ignore_index=1)[0].nonzero().flatten().tolist() == [0, 156]


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 0)])
def test_presence_of_nothing(shape):
    assert torch.equal(presence(torch.zeros(shape, dtype=torch.int64), 3), torch.zeros(shape[0], 3, dtype=torch.bool))


@pytest.mark.parametrize("label", [4, 5, 254, -1, 256])
def test_a_label_beyond_the_classes_is_refused(label):
    target = MASKS.clone()
    target[0, 0, 0] = label
    with pytest.raises(RuntimeError, match="out of bounds"):
        presence(target, 4)
    with pytest.raises(RuntimeError, match="out of bounds"):
        DiceLoss()(torch.zeros(3, 4, 2, 3), target)
    with pytest.raises(IndexError, match="out of bounds"):
        EncNetLoss()(outputs_for(target), target)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("se_loss", ["bce", "mse"])
def test_the_sum_of_the_terms(se_loss, dtype):
    outputs = outputs_for(MASKS)
    loss = EncNetLoss(aux_weight=0.3, se_weight=0.7, se_loss=se_loss)
    se, found = outputs["se"][:2], PRESENT[:2].double()  # the third image is not labelled
    if se_loss == "bce":
        wanted_se = F.binary_cross_entropy_with_logits(se, found)
    else:
        wanted_se = F.mse_loss(se.sigmoid(), found)
    wanted = {
        "out": F.cross_entropy(outputs["out"], MASKS, ignore_index=IGNORE),
        "aux": F.cross_entropy(outputs["aux"], MASKS, ignore_index=IGNORE),
        "se": wanted_se,
    }
    torch.testing.assert_close(loss.parts(outputs, MASKS.to(dtype)), wanted)
    total = wanted["out"] + 0.3 * wanted["aux"] + 0.7 * wanted["se"]
    got = loss(outputs, MASKS.to(dtype))
    torch.testing.assert_close(got, total)
    torch.testing.assert_close(gradients(got, outputs), gradients(total, outputs))


def test_the_se_loss_by_hand():
    outputs = {"out": torch.zeros(1, 2, 1, 1), "se": torch.tensor([[0.0, np.log(3.0)]])}  # sigmoids 1/2 and 3/4
    target = torch.zeros(1, 1, 1, dtype=torch.int64)  # class 0 is there, class 1 is not
    loss = EncNetLoss(se_weight=1)
    assert float(loss.parts(outputs, target)["out"]) == pytest.approx(np.log(2))
    assert float(loss.parts(outputs, target)["se"]) == pytest.approx((np.log(2) + np.log(4)) / 2)
    squared = EncNetLoss(se_weight=1, se_loss="mse")
    assert float(squared.parts(outputs, target)["se"]) == pytest.approx((1 / 4 + 9 / 16) / 2)
    assert float(squared(outputs, target)) == pytest.approx(np.log(2) + 13 / 32)


@pytest.mark.parametrize("ignore_index", [255, -100, 2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weight", [None, [0.5, 3.0, 1.0, 0.0]])  # of the six labelled pixels: 7
def test_cross_entropy_is_torchs(weight, smoothing, ignore_index):
    target = MASKS.where(MASKS != IGNORE, ignore_index)
    outputs = outputs_for(target)
    loss = EncNetLoss(class_weight=weight, label_smoothing=smoothing, ignore_index=ignore_index)
    torch_weight = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    for name in ("out", "aux"):
        wanted = F.cross_entropy(
            outputs[name], target, torch_weight, ignore_index=ignore_index, label_smoothing=smoothing
        )
        torch.testing.assert_close(loss.parts(outputs, target)[name], wanted)


def test_class_weight_moves_with_the_loss_and_is_a_copy():
    weight = torch.ones(4)
    loss = EncNetLoss(class_weight=weight)
    weight.zero_()
    loss.to(torch.float64)
    assert loss.class_weight.tolist() == [1, 1, 1, 1]
    assert loss.class_weight.dtype == torch.float64
    assert "class_weight" in loss.state_dict()
    assert not EncNetLoss().state_dict()


@pytest.mark.parametrize(
    ("target", "why"),
    [(torch.full((2, 3, 3), IGNORE), "ignored"), (torch.zeros(0, 3, 3, dtype=torch.int64), "empty batch")],
)
@pytest.mark.parametrize("weight", [None, [1.0, 0.0, 2.0, 1.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_nothing_labelled_is_no_loss_and_no_gradient(target, why, weight, smoothing):
    outputs = outputs_for(target, dtype=torch.float32)
    loss = EncNetLoss(class_weight=weight, label_smoothing=smoothing)(outputs, target)
    assert loss.item() == 0
    for gradient in gradients(loss, outputs).values():
        assert torch.equal(gradient, torch.zeros_like(gradient))
    dice = DiceLoss(smooth=0.0)(outputs["out"], target)
    assert dice.item() == 0
    (gradient,) = torch.autograd.grad(dice, outputs["out"])
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_an_unlabelled_image_teaches_nothing():
    outputs = outputs_for(MASKS)
    got = gradients(EncNetLoss(1.0, 1.0)(outputs, MASKS), outputs)
    for name in outputs:
        assert torch.equal(got[name][2], torch.zeros_like(got[name][2])), name
        assert got[name][:2].abs().sum() > 0


def test_ignored_pixels_get_no_gradient():
    outputs = outputs_for(MASKS)
    total = EncNetLoss(1.0, 0.0)(outputs, MASKS) + DiceLoss()(outputs["out"], MASKS)
    found = gradients(total, outputs)
    for name in ("out", "aux"):
        pixels = found[name].abs().sum(1)
        assert torch.equal(pixels > 0, MASKS != IGNORE)


def test_a_weight_of_zero_skips_its_term():
    outputs = outputs_for(MASKS)
    loss = EncNetLoss(aux_weight=0, se_weight=0)
    assert set(loss.parts(outputs, MASKS)) == {"out"}
    found = gradients(loss(outputs, MASKS), outputs)
    assert found["aux"] is None
    assert found["se"] is None


@pytest.mark.parametrize("present", [("out",), ("out", "se"), ("out", "aux")])
def test_what_the_network_does_not_give_is_left_out(present):
    outputs = {name: value for name, value in outputs_for(MASKS).items() if name in present}
    loss = EncNetLoss()
    parts = loss.parts(outputs, MASKS)
    assert set(parts) == set(present)
    wanted = sum((1.0 if name == "out" else 0.2) * value for name, value in parts.items())
    torch.testing.assert_close(loss(outputs, MASKS), wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_fp32(dtype):
    target = torch.randint(0, 4, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    outputs = outputs_for(target, dtype=dtype)
    exact = {name: value.detach().double() for name, value in outputs.items()}
    for loss, got, wanted in (
        (EncNetLoss(), outputs, exact),
        (DiceLoss(), outputs["out"], exact["out"]),
    ):
        value = loss(got, target)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), loss(wanted, target), rtol=1e-5, atol=0)
        with torch.autocast("cpu", dtype=dtype):
            torch.testing.assert_close(loss(got, target), value, rtol=1e-6, atol=0)


def dice_by_hand(logits, target, smooth):
    """With loops over classes and pixels, in NumPy."""
    scores = np.moveaxis(logits, 1, -1)
    p = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    counted = target != IGNORE
    losses = []
    for number in range(p.shape[-1]):
        own, there = p[..., number][counted], target[counted] == number
        if there.any():
            losses.append(1 - (2 * own[there].sum() + smooth) / (own.sum() + there.sum() + smooth))
    return np.mean(losses)


@pytest.mark.parametrize("smooth", [0.0, 1.0, 3.5])
def test_dice_against_numpy(smooth):
    logits = outputs_for(MASKS)["out"]
    wanted = dice_by_hand(logits.detach().numpy(), MASKS.numpy(), smooth)
    assert DiceLoss(smooth=smooth)(logits, MASKS).item() == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_dice_against_other_libraries(smooth):
    """Soft as segmentation_models_pytorch has it; hard, where it is one minus the F score of torchmetrics."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 5, (3, 17, 19), generator=generator)
    target[torch.rand(target.shape, generator=generator) < 0.2] = IGNORE
    logits = torch.randn(3, 5, 17, 19, generator=generator, dtype=torch.float64)
    soft = smp.losses.DiceLoss("multiclass", smooth=smooth / 2, ignore_index=IGNORE)(logits, target)  # adds it twice
    assert DiceLoss(smooth=smooth)(logits, target).item() == pytest.approx(soft.item(), rel=1e-9)
    score = multiclass_f1_score(logits.argmax(1), target, 5, average="macro", ignore_index=IGNORE)
    hard = F.one_hot(logits.argmax(1), 5).movedim(-1, 1) * 1e4
    assert DiceLoss(smooth=0.0)(hard, target).item() == pytest.approx(1 - score.item(), rel=1e-6)


def test_dice_at_its_ends():
    target = MASKS[:1]
    right = F.one_hot(target.where(target != IGNORE, 0), 4).movedim(-1, 1) * 1000.0
    assert float(DiceLoss(smooth=0.0)(right, target)) == 0
    assert float(DiceLoss(smooth=0.0)(right.roll(1, 1), target)) == 1
    # One of five pixels wrong: class 0 has Dice 2/3, class 2 has 6/7.
    wrong = right.clone()
    wrong[0, :, 0, 0] = right[0, :, 1, 0]
    assert float(DiceLoss(smooth=0.0)(wrong, target)) == pytest.approx(1 - (2 / 3 + 6 / 7) / 2)


@pytest.mark.parametrize(
    "loss",
    [
        DiceLoss(),
        DiceLoss(smooth=0.0),
        lambda logits, target: EncNetLoss(class_weight=[1, 2, 3, 4])({"out": logits}, target),
    ],
)
def test_gradcheck(loss):
    logits = outputs_for(MASKS)["out"]
    assert torch.autograd.gradcheck(lambda x: loss(x, MASKS), logits)


@pytest.mark.parametrize("se_loss", ["bce", "mse"])
def test_gradcheck_of_the_se_loss(se_loss):
    outputs = outputs_for(MASKS)
    loss = EncNetLoss(se_loss=se_loss)
    assert torch.autograd.gradcheck(lambda x: loss(outputs | {"se": x}, MASKS), outputs["se"])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_compiles_without_a_break(backend):
    torch.compiler.reset()
    outputs = outputs_for(MASKS, dtype=torch.float32)
    loss, dice = EncNetLoss(class_weight=[1, 2, 3, 4]), DiceLoss()

    def everything(outputs, target):
        return loss(outputs, target) + dice(outputs["out"], target), presence(target, 4)

    got, found = torch.compile(everything, backend=backend, fullgraph=True)(outputs, MASKS)
    wanted, _ = everything(outputs, MASKS)
    assert torch.equal(found, PRESENT)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(gradients(got, outputs), gradients(wanted, outputs))
    torch.compiler.reset()


def test_presence_takes_no_memory_of_pixels_times_classes():
    """Bytes are counted by shape alone: on the meta device nothing is computed."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
            return result

    target = torch.zeros(2, 64, 64, dtype=torch.int64, device="meta")
    with Largest() as seen:
        presence(target, 150)
    assert seen.elements == target.numel()


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"aux_weight": -0.1}, ValueError, "EncNetLoss: aux_weight must be a finite number of at least 0, got -0.1"),
        ({"se_weight": float("nan")}, ValueError, "EncNetLoss: se_weight must be a finite number .*, got nan"),
        ({"se_weight": float("inf")}, ValueError, "EncNetLoss: se_weight must be a finite number .*, got inf"),
        ({"se_weight": "0.2"}, TypeError, "EncNetLoss: se_weight must be a finite number .*, got '0.2'"),
        ({"se_weight": True}, TypeError, "EncNetLoss: se_weight must be .*, got True"),
        ({"label_smoothing": 1.5}, ValueError, "EncNetLoss: label_smoothing must be a number from 0 to 1, got 1.5"),
        ({"ignore_index": 255.0}, TypeError, "EncNetLoss: ignore_index must be an integer, got 255.0"),
        ({"ignore_index": None}, TypeError, "EncNetLoss: ignore_index must be an integer, got None"),
        ({"se_loss": "focal"}, ValueError, "EncNetLoss: se_loss must be one of bce, mse, got 'focal'"),
        ({"class_weight": [1.0, -1.0]}, ValueError, r"EncNetLoss: class_weight must hold .*, got \[1.0, -1.0\]"),
        ({"class_weight": [float("nan")]}, ValueError, r"EncNetLoss: class_weight must hold .*, got \[nan\]"),
        ({"class_weight": [[1.0]]}, ValueError, r"class_weight must have shape \(classes,\), got \(1, 1\)"),
    ],
)
def test_settings_of_encnet_loss_are_checked(settings, error, text):
    with pytest.raises(error, match=f"{text}$" if text[-1] != ")" else text):
        EncNetLoss(**settings)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"smooth": -1}, ValueError, "DiceLoss: smooth must be a finite number of at least 0, got -1"),
        ({"smooth": None}, TypeError, "DiceLoss: smooth must be a finite number of at least 0, got None"),
        ({"ignore_index": True}, TypeError, "DiceLoss: ignore_index must be an integer, got True"),
    ],
)
def test_settings_of_dice_are_checked(settings, error, text):
    with pytest.raises(error, match=text):
        DiceLoss(**settings)


OUT = torch.zeros(3, 4, 2, 3)


@pytest.mark.parametrize(
    ("outputs", "error", "text"),
    [
        (OUT, TypeError, "EncNetLoss: outputs must be a dict of out, aux and se, got Tensor"),
        ({}, ValueError, "outputs must hold out, may hold aux and se, and no other key, got none"),
        ({"se": OUT}, ValueError, "and no other key, got se"),
        ({"out": OUT, "auxiliary": OUT}, ValueError, "and no other key, got out, auxiliary"),
        ({"out": OUT[0]}, ValueError, r'outputs\["out"\] must have shape \(B, classes, H, W\), got \(4, 2, 3\)'),
        (
            {"out": OUT[:2]},
            ValueError,
            r"target must have shape \(2, 2, 3\) to match .* \(2, 4, 2, 3\), got \(3, 2, 3\)",
        ),
        ({"out": OUT.mT}, ValueError, r"target must have shape \(3, 3, 2\) to match .*, got \(3, 2, 3\)"),
        (
            {"out": OUT, "aux": OUT[..., :2]},
            ValueError,
            r'outputs\["aux"\] must have shape \(3, 4, 2, 3\) .* \(3, 4, 2, 2\)',
        ),
        ({"out": OUT[:, :1]}, ValueError, r'outputs\["out"\] must have two classes or more, .* got 1'),
        ({"out": OUT, "aux": None}, TypeError, r'outputs\["aux"\] must be a tensor or left out, got NoneType'),
        ({"out": OUT, "se": OUT[:, :3, 0, 0]}, ValueError, r'outputs\["se"\] must have shape \(3, 4\) .* got \(3, 3\)'),
    ],
)
def test_outputs_are_checked(outputs, error, text):
    with pytest.raises(error, match=text):
        EncNetLoss(aux_weight=0, se_weight=0)(outputs, MASKS)


def test_class_weight_must_fit_the_logits():
    with pytest.raises(ValueError, match=r"class_weight must have 4 values to match out \(3, 4, 2, 3\), got 3"):
        EncNetLoss(class_weight=[1, 1, 1])({"out": OUT}, MASKS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_targets_must_be_integers(dtype):
    for name, call in {
        "EncNetLoss": lambda target: EncNetLoss()({"out": OUT}, target),
        "DiceLoss": lambda target: DiceLoss()(OUT, target),
        "presence": lambda target: presence(target, 4),
    }.items():
        with pytest.raises(TypeError, match=f"{name}: target must hold integers, got {dtype}"):
            call(MASKS.to(dtype))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((MASKS[0], 4), ValueError, r"presence: target must have shape \(B, H, W\), got \(2, 3\)"),
        ((MASKS, 0), ValueError, "presence: num_classes must be a positive integer, got 0"),
        ((MASKS, 4.0), TypeError, "presence: num_classes must be a positive integer, got 4.0"),
        ((MASKS, 4, "255"), TypeError, "presence: ignore_index must be an integer, got '255'"),
    ],
)
def test_arguments_of_presence_are_checked(arguments, error, text):
    with pytest.raises(error, match=text):
        presence(*arguments)


def test_print():
    assert repr(EncNetLoss()) == "EncNetLoss(aux_weight=0.2, se_weight=0.2, ignore_index=255)"
    assert repr(DiceLoss()) == "DiceLoss(ignore_index=255, smooth=1.0)"


@pytest.mark.parametrize(
    ("logits", "target", "text"),
    [
        ([1.0], torch.zeros(1, 2, 2, dtype=torch.long), "must be a floating-point tensor, got list"),
        (torch.zeros(1, 3, 2, 2, dtype=torch.long), torch.zeros(1, 2, 2, dtype=torch.long), "got torch.int64"),
        (torch.zeros(1, 3, 2, 2), [[0]], "target must be a tensor of integers, got list"),
    ],
)
def test_what_is_no_tensor_is_refused(logits, target, text):
    with pytest.raises(TypeError, match=text):
        DiceLoss()(logits, target)
    with pytest.raises(TypeError, match=text):
        EncNetLoss()({"out": logits}, target)
