import json

import pytest
import timm
import torch
from torch import nn

import ctxenc
from ctxenc.integrations.checkpoints import save_encnet_checkpoint
from ctxenc.integrations.encnet import EncNet

FAMILIES = {
    "resnet18": 5,
    "seresnet18": 5,
    "resnest14d": 5,
    "regnety_002": 5,
    "convnext_atto": 4,
    "efficientnet_b0": 5,
    "mobilenetv3_small_050": 5,
    "nf_resnet26": 5,
    "rexnet_100": 5,
}


def small(**arguments):
    torch.manual_seed(0)
    return EncNet("resnet10t", 3, **({"channels": 16, "num_codes": 4} | arguments))


@pytest.mark.parametrize("backbone", FAMILIES)
def test_every_family_that_timm_dilates(backbone):
    network = EncNet(backbone, 3, channels=16, num_codes=4, lateral=True).eval()
    assert network.backbone.feature_info.reduction() == [8, 8, 8]
    with torch.no_grad():
        outputs = network(torch.randn(1, 3, 65, 97))
    assert {name: tuple(output.shape) for name, output in outputs.items()} == {
        "out": (1, 3, 65, 97),
        "aux": (1, 3, 65, 97),
        "se": (1, 3),
    }


@pytest.mark.parametrize("aux", [False, True])
@pytest.mark.parametrize("se_loss", [False, True])
@pytest.mark.parametrize("lateral", [False, True])
def test_every_parameter_learns(aux, se_loss, lateral):
    network = small(aux=aux, se_loss=se_loss, lateral=lateral)
    outputs = network(torch.randn(2, 3, 33, 40))
    assert outputs.keys() == {"out"} | ({"aux"} if aux else set()) | ({"se"} if se_loss else set())
    sum(output.square().mean() for output in outputs.values()).backward()
    assert [name for name, parameter in network.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_output_stride(output_stride):
    network = small(output_stride=output_stride)
    maps = network.backbone(torch.randn(2, 3, 64, 96))
    assert maps[-1].shape[2:] == (64 // output_stride, 96 // output_stride)
    assert network(torch.randn(2, 3, 64, 96))["out"].shape == (2, 3, 64, 96)


def test_fewer_stages_end_at_a_smaller_stride():
    network = small(stages=2)
    assert network.backbone.feature_info.reduction() == [2, 4]
    assert [name for name, _ in network.backbone.named_children() if "layer" in name] == ["layer1"]
    assert network(torch.randn(2, 3, 64, 96))["out"].shape == (2, 3, 64, 96)
    assert network.config["stages"] == 2


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (64, 64), (65, 97)])
def test_any_size(size):
    assert small().eval()(torch.randn(1, 3, *size))["out"].shape == (1, 3, *size)


def test_the_head_is_the_paper_s():
    network = EncNet("resnet50", 21, lateral=True)
    shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters() if "backbone" not in name}
    assert shapes["reduce.0.weight"] == (512, 2048, 3, 3)
    assert shapes["laterals.0.0.weight"] == (512, 512, 1, 1)
    assert shapes["laterals.1.0.weight"] == (512, 1024, 1, 1)
    assert shapes["fusion.0.weight"] == (512, 1536, 3, 3)
    assert shapes["encoding.context.conv.weight"] == (512, 512, 1, 1)
    assert shapes["encoding.context.encoding.codewords"] == (32, 512)
    assert shapes["encoding.context.fc.weight"] == (512, 512)
    assert shapes["encoding.presence.weight"] == (21, 512)
    assert shapes["classifier.1.weight"] == (21, 512, 1, 1)
    assert shapes["aux.0.0.weight"] == (256, 1024, 3, 3)
    dropouts = [module.p for module in network.modules() if isinstance(module, nn.Dropout2d)]
    assert dropouts == [0.1, 0.1]


def test_align_corners_is_that_of_the_logits():
    x = torch.randn(1, 3, 40, 40)
    for align_corners in (False, True):
        network = small(align_corners=align_corners).eval()
        logits, _ = network.head(network.backbone(x))
        wanted = nn.functional.interpolate(logits, (40, 40), mode="bilinear", align_corners=align_corners)
        torch.testing.assert_close(network(x)["out"], wanted)


def test_norm_layer_is_that_of_the_head():
    network = small(norm_layer="groupnorm", channels=32)
    assert isinstance(network.reduce[1], nn.GroupNorm)
    assert isinstance(network.encoding.context.norm, nn.GroupNorm)
    assert isinstance(network.backbone.bn1, nn.BatchNorm2d)
    assert [module.num_groups for module in small(norm_layer="groupnorm").modules() if isinstance(module, nn.GroupNorm)]
    EncNet("regnety_002", 3, channels=48, num_codes=4, norm_layer="groupnorm")(torch.randn(1, 3, 40, 40))
    assert isinstance(small(norm_layer=nn.InstanceNorm2d).reduce[1], nn.InstanceNorm2d)


def test_smoothing_and_no_weight_decay():
    network = small(smoothing=0.5)
    assert network.encoding.context.smoothing == 0.5
    names = {"encoding.context.encoding.codewords", "encoding.context.encoding.smoothing"}
    assert network.no_weight_decay() == {"encoding.context.encoding.codewords"}
    assert small().no_weight_decay() == names
    patched = ctxenc.patch_se_blocks(EncNet("seresnet18", 3, channels=16))
    blocks = {f"{block.name}.encoding.codewords" for block in ctxenc.find_context_blocks(patched)}
    assert len(blocks) == 8
    assert names | blocks < patched.no_weight_decay()


@pytest.mark.parametrize(
    "arguments", [{}, {"norm_layer": "groupnorm", "channels": 32, "lateral": True, "smoothing": 0.25}]
)
def test_save_and_load(tmp_path, arguments, capsys):
    network = small(align_corners=True, aux=False, **arguments).eval()
    network.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = EncNet.from_pretrained(tmp_path)
    assert not loaded.training
    x = torch.randn(1, 3, 20, 24)
    assert all(torch.equal(loaded(x)[name], output) for name, output in network(x).items())


def test_loading_is_strict_and_asks_timm_for_no_weights(tmp_path, capsys):
    network = small()
    network.config["pretrained_backbone"] = True
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_backbone"] is False
    (tmp_path / "config.json").write_text(json.dumps(config | {"lateral": True, "pretrained_backbone": True}))
    with pytest.raises(RuntimeError, match="Missing key"):
        EncNet.from_pretrained(tmp_path)


def test_saved_files_may_be_read_as_any_other(tmp_path):
    small().save_pretrained(tmp_path)
    modes = {(tmp_path / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1


def test_a_patched_network_is_not_saved_as_what_it_was(tmp_path):
    network = EncNet("seresnet18", 3, channels=16, num_codes=4)
    ctxenc.patch_se_blocks(network)
    with pytest.raises(ValueError, match=r"EncNet: to be saved, .* changed at backbone.layer1.0.se"):
        network.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    ctxenc.restore_se_blocks(network)
    network.save_pretrained(tmp_path / "folder")


def test_another_classifier_is_not_saved_as_the_old_one(tmp_path):
    network = small()
    network.classifier[1] = nn.Conv2d(network.classifier[1].in_channels, 9, 1)
    with pytest.raises(ValueError, match=r"changed at classifier.1.bias: \(9,\) for \(\d,\)"):
        network.save_pretrained(tmp_path / "folder")


def test_a_save_that_fails_leaves_no_file(tmp_path):
    network = small()
    network.encoding.context.fc.weight = network.encoding.presence.weight = nn.Parameter(torch.zeros(16, 16))  # tied
    network.checked_config = lambda: {}
    with pytest.raises(RuntimeError, match="share memory"):
        save_encnet_checkpoint(network, tmp_path / "tied.safetensors")
    assert not list(tmp_path.iterdir())


def test_syncbn_as_timm_converts_it_keeps_the_network():
    for name in ("regnety_002", "test_efficientnet"):
        network = EncNet(name, 3, channels=16, num_codes=4).eval()
        x = torch.randn(1, 3, 40, 40)
        wanted = network(x)["out"]
        converted = timm.layers.convert_sync_batchnorm(network)
        assert any(isinstance(module, nn.SyncBatchNorm) for module in converted.modules())
        torch.testing.assert_close(converted(x)["out"], wanted)


def test_what_cannot_be_saved_says_so(tmp_path):
    network = small(norm_layer=nn.InstanceNorm2d)
    with pytest.raises(TypeError, match="EncNet: norm_layer must be JSON to be saved, got "):
        network.save_pretrained(tmp_path)
    small(norm_layer=nn.BatchNorm2d).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"backbone": "resnet5O"},
            ValueError,
            r"EncNet: backbone must be the name of a timm model, got 'resnet5O'; near: ",
        ),
        ({"backbone": "hf_hub:timm/resnet18"}, ValueError, "EncNet: backbone must be the name of a timm model"),
        ({"backbone": 50}, TypeError, "EncNet: backbone must be the name of a timm model, got 50"),
        *(
            ({"backbone": name}, ValueError, f"EncNet: backbone must be one that timm can .* got '{name}'")
            for name in (
                "vovnet39a",
                "dla34",
                "densenet121",
                "legacy_seresnet18",
                "swin_tiny_patch4_window7_224",
                "hgnet_tiny",
            )
        ),
        ({"output_stride": 4}, ValueError, "EncNet: output_stride must be one of 8, 16, 32, got 4"),
        ({"stages": 6}, ValueError, "EncNet: backbone must be one that timm can .* got 'resnet18'"),
        ({"stages": 1}, ValueError, "EncNet: stages must be an integer of at least 2, the maps that are used, got 1"),
        ({"num_classes": 0}, ValueError, "EncNet: num_classes"),
        ({"num_classes": 2.5}, TypeError, "EncNet: num_classes"),
        ({"num_codes": 0}, ValueError, "EncNet: num_codes"),
        ({"smoothing": 0.0}, ValueError, "EncNet: smoothing"),
        ({"norm_layer": "batchnorm"}, ValueError, "EncNet: norm_layer must be one of batchnorm2d, "),
        ({"aux": "no"}, TypeError, "EncNet: aux must be True or False, got 'no'"),
        ({"align_corners": 1}, TypeError, "EncNet: align_corners must be True or False, got 1"),
        ({"backbone": "resnet18.nonsense"}, ValueError, "EncNet: backbone must have one of timm's tags for resnet18"),
        ({"output_stride": 8.0}, ValueError, "EncNet: output_stride must be one of 8, 16, 32, got 8.0"),
        ({"norm_layer": 3}, TypeError, "EncNet: norm_layer must be a name or a class, got 3"),
    ],
)
def test_refusals(arguments, error, text):
    with pytest.raises(error, match=text):
        EncNet(**({"backbone": "resnet18"} | arguments))


def test_it_compiles_exports_and_keeps_dtype_under_autocast():
    network, x = small().eval(), torch.randn(2, 3, 40, 56)
    with torch.no_grad():
        wanted = network(x)["out"]
        compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x)["out"], wanted)
        torch.testing.assert_close(torch.export.export(network, (x,)).module()(x)["out"], wanted)
        with torch.autocast("cpu", torch.bfloat16):
            assert (network(x)["out"] - wanted).abs().max() < 0.1 * wanted.std()
        torch.testing.assert_close(network.to(memory_format=torch.channels_last)(x)["out"], wanted)
