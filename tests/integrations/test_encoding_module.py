import pytest
import torch
from torch import nn

from ctxenc import ContextEncoding, find_context_blocks, patch_se_blocks
from ctxenc.integrations.encoding_module import EncodingModule, add_context_encoding
from ctxenc.kernels.reference import encode as reference_encode


def test_it_computes_what_the_paper_says():
    module = EncodingModule(6, num_codes=3, num_classes=4).eval()
    context, x = module.context, torch.randn(2, 6, 5, 7)
    context.norm.running_var.uniform_(0.5, 2)
    context.norm_codes.running_mean.normal_()
    z = torch.relu(context.norm(context.conv(x)))
    e = reference_encode(z.flatten(2), context.encoding.codewords, context.encoding.smoothing) / z[0, 0].numel()
    norm = context.norm_codes
    e = (e - norm.running_mean[:, None]) / (norm.running_var[:, None] + norm.eps).sqrt() * norm.weight[
        :, None
    ] + norm.bias[:, None]
    e = torch.relu(e).mean(1)
    gate = torch.sigmoid(e @ context.fc.weight.T + context.fc.bias)[:, :, None, None]
    out, presence = module(x)
    torch.testing.assert_close(out, torch.relu(x + x * gate))
    torch.testing.assert_close(presence, e @ module.presence.weight.T + module.presence.bias)


def test_without_classes_there_is_no_presence_branch():
    module = EncodingModule(8)
    assert module.presence is None
    assert module(torch.randn(2, 8, 3, 3))[1] is None
    assert module.context.num_codes == 32


def test_the_residual_gate_has_right_gradients_and_lets_its_owner_change_the_output_in_place():
    block = ContextEncoding(5, 2, rd_channels=3, residual=True).double().eval()
    x = torch.randn(2, 5, 3, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(block, (x,))
    block(x).mul_(2).sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_the_residual_gate_scripts_traces_and_compiles():
    block = ContextEncoding(8, 2, residual=True).eval()
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(torch.jit.script(block)(x), block(x))
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), block(x))
    torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), block(x))


def test_half_parameters_and_autocast():
    x = torch.randn(2, 8, 4, 4)
    out, presence = EncodingModule(8, 4, 3).to(torch.bfloat16)(x.bfloat16())
    assert out.dtype == presence.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        out, presence = EncodingModule(8, 4, 3)(x)
    assert out.isfinite().all()
    assert presence.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"channels": 0}, ValueError, "EncodingModule: channels"),
        ({"channels": 4, "num_codes": 1.5}, TypeError, "EncodingModule: num_codes"),
        ({"channels": 4, "num_classes": 0}, ValueError, "EncodingModule: num_classes"),
        ({"channels": 4, "smoothing": -1.0}, ValueError, "smoothing"),
    ],
)
def test_refusals(arguments, error, text):
    with pytest.raises(error, match=text):
        EncodingModule(**arguments)


@pytest.mark.parametrize("center", [False, True])
def test_names_in_the_state_dict_stay(center):
    smp = pytest.importorskip("segmentation_models_pytorch")
    decoder = smp.decoders.unet.decoder.UnetDecoder
    model = smp.Unet("resnet18", encoder_weights=None)
    model.decoder = decoder(model.encoder.out_channels, (256, 128, 64, 32, 16), add_center_block=center)
    names = model.state_dict().keys()
    assert names < add_context_encoding(model, num_codes=4).state_dict().keys()


def _segmentation(name):
    if name in ("fcn", "deeplab"):
        from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large, fcn_resnet50

        if name == "fcn":
            return fcn_resnet50(weights=None, weights_backbone=None, num_classes=3, aux_loss=True)
        return deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=3)
    smp = pytest.importorskip("segmentation_models_pytorch")
    encoder = "tu-seresnet18" if name in ("unet", "fpn") else "resnet18"
    network = smp.FPN if name.startswith("fpn") else smp.Unet
    arguments = {"decoder_use_norm": "batchnorm"} if name.startswith("unet") else {}
    return network(encoder, encoder_weights=None, classes=3, **arguments)


def _step(model, size=64):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    outputs = model(torch.randn(2, 3, size, size))
    outputs = outputs if isinstance(outputs, dict) else {"out": outputs}
    loss = sum(nn.functional.cross_entropy(each, torch.randint(3, (2, size, size))) for each in outputs.values())
    loss.backward()
    optimizer.step()
    assert outputs["out"].shape == (2, 3, size, size)
    return loss


@pytest.mark.parametrize("name", ["fcn", "deeplab", "unet", "fpn"])
def test_other_networks_take_the_module_and_a_training_step(name):
    model = _segmentation(name)
    names = model.state_dict().keys()
    swapped = name != "fcn"  # its ResNet has no SE blocks
    if swapped:
        patch_se_blocks(model)
    assert add_context_encoding(model, num_codes=4) is model
    added = [module for module in model.modules() if isinstance(module, ContextEncoding) and module.residual]
    assert len(added) == 1
    assert bool(find_context_blocks(model)) == swapped
    if not swapped:
        assert names < model.state_dict().keys()
    before = added[0].encoding.codewords.detach().clone()
    assert _step(model).isfinite()
    assert all(parameter.grad is not None for parameter in added[0].parameters())
    assert not torch.equal(before, added[0].encoding.codewords)


def test_a_second_one_and_other_networks_are_refused():
    model = add_context_encoding(_segmentation("fcn"))
    with pytest.raises(ValueError, match="must not have a Context Encoding Module yet, got FCN"):
        add_context_encoding(model)
    with pytest.raises(ValueError, match=r"add_context_encoding: model must be .* got torch\.Linear"):
        add_context_encoding(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="add_context_encoding: model must be a"):
        add_context_encoding("fcn")


def test_mask_rcnn_with_an_se_backbone_trains():
    from torchvision.models.detection import MaskRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.backbone_utils import mobilenet_backbone

    backbone = mobilenet_backbone(backbone_name="mobilenet_v3_large", weights=None, fpn=True, trainable_layers=6)
    anchors = AnchorGenerator(((32, 64),) * 3, ((0.5, 1.0, 2.0),) * 3)
    model = MaskRCNN(backbone, num_classes=2, min_size=64, max_size=64, rpn_anchor_generator=anchors)
    patch_se_blocks(model)
    blocks = find_context_blocks(model)
    assert blocks
    targets = [
        {
            "boxes": torch.tensor([[4.0, 4, 40, 40]]),
            "labels": torch.tensor([1]),
            "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
        }
    ]
    losses = model(torch.rand(1, 3, 64, 64).unbind(), targets)
    sum(losses.values()).backward()
    assert model.get_submodule(blocks[0].name).encoding.codewords.grad is not None
