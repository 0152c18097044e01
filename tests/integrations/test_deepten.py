"""Deep TEN: what it computes, the backbones that it takes, and saving."""

import json
import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from ctxenc.integrations.deepten import DeepTEN, _prefix_pattern
from ctxenc.kernels import reference

# One of each kind: plain, without norms, NHWC, with attention, and one whose head widens the map
BACKBONES = {
    "test_resnet": 96,
    "test_nfnet": 192,
    "test_mambaout": 256,
    "test_convnext": 64,
    "mobilenetv3_small_050": 1024,
}
X = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def small(backbone: str = "test_resnet", num_classes: int = 5, **arguments) -> DeepTEN:
    torch.manual_seed(0)
    return DeepTEN(backbone, num_classes, **({"num_codes": 4, "rd_channels": 8} | arguments)).eval()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_it_is_the_network_of_the_paper(backbone):
    model = small(backbone).double()
    model.norm.weight.data.uniform_(0.5, 1.5)
    model.norm.running_mean.normal_(std=0.1)
    x = X[..., :64].double()  # not square
    with torch.no_grad():
        z = model.backbone(x)
        assert z.shape[3 if backbone == "test_mambaout" else 1] == BACKBONES[backbone]
        z = torch.einsum(
            "dc,bhwc->bdhw" if backbone == "test_mambaout" else "dc,bchw->bdhw", model.conv.weight[:, :, 0, 0], z
        )
        norm = model.norm
        z = (z - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
        z = (z * norm.weight[:, None, None] + norm.bias[:, None, None]).clamp(min=0)
        torch.testing.assert_close(model.forward_features(x), z, rtol=1e-9, atol=1e-9)
        e = reference.encode(z.flatten(2), model.encoding.codewords, model.encoding.smoothing).reshape(2, 4 * 8)
        e = e / e.square().sum(1, keepdim=True).sqrt()
        torch.testing.assert_close(model(x), e @ model.fc.weight.T + model.fc.bias, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.forward_head(z, pre_logits=True), e, rtol=1e-9, atol=1e-9)


def test_defaults_are_the_papers():
    with torch.device("meta"):
        model = DeepTEN()
    assert model.config == {
        "backbone": "resnet50",
        "num_classes": 23,
        "in_chans": 3,
        "num_codes": 32,
        "rd_channels": 128,
        "smoothing": "learned",
        "start": "paper",
        "global_pool": "encoding",
        "drop_rate": 0.0,
    }
    assert model.conv.weight.shape == (128, 2048, 1, 1)
    assert model.fc.weight.shape == (23, 4096)
    assert (model.num_features, model.head_hidden_size) == (128, 4096)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_backbone_is_timms_and_not_touched_by_looking_at_its_map(backbone):
    torch.manual_seed(0)
    plain = timm.create_model(backbone, num_classes=0, global_pool="")
    model = small(backbone)
    assert model.training is False
    assert DeepTEN(backbone, 5).backbone.training
    for (key, tensor), (other_key, other) in zip(
        plain.state_dict().items(), model.backbone.state_dict().items(), strict=True
    ):
        assert key == other_key
        assert torch.equal(tensor, other), key


def test_arguments_reach_the_backbone():
    model = small("resnet18", output_stride=8, drop_path_rate=0.2, in_chans=1)
    assert model.in_chans == 1
    assert model.forward_features(X[:, :1]).shape == (2, 8, 12, 12)
    assert model.backbone.layer4[-1].drop_path.drop_prob == pytest.approx(0.2)
    fixed = small("swin_tiny_patch4_window7_224", img_size=112, embed_dim=8, depths=(1, 1), num_heads=(1, 1))
    assert fixed(torch.randn(1, 3, 112, 112)).shape == (1, 5)


def test_a_backbone_whose_norms_want_more_than_one_value_is_looked_at():
    """ResNeSt norms pooled vectors, which one image in training is too few for."""
    with torch.device("meta"):
        assert DeepTEN("resnest14d").conv.in_channels == 2048


# Saving


@pytest.mark.parametrize(
    ("backbone", "arguments"),
    [
        ("test_resnet", {}),
        ("resnet18", {"smoothing": 0.7, "in_chans": 1, "drop_rate": 0.5, "output_stride": 16, "act_layer": "silu"}),
        ("test_mambaout", {"smoothing": "sampled"}),
    ],
)
def test_from_pretrained_builds_the_very_network(backbone, arguments, tmp_path):
    model, x = small(backbone, **arguments), X[:, : arguments.get("in_chans", 3)]
    assert model.save_pretrained(tmp_path) is None
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    loaded = DeepTEN.from_pretrained(tmp_path)
    assert not loaded.training
    assert repr(loaded) == repr(model.eval())
    assert loaded.config == model.config
    assert torch.equal(loaded(x), model(x))
    loaded.save_pretrained(tmp_path / "again")
    again = DeepTEN.from_pretrained(tmp_path / "again", map_location="cpu")
    assert torch.equal(again(x), model(x))


def test_nothing_is_downloaded_to_load(tmp_path, monkeypatch):
    asked = []
    create = timm.create_model

    def spy(name, pretrained, **arguments):
        asked.append(pretrained)
        return create(name, pretrained=False, **arguments)

    monkeypatch.setattr("ctxenc.integrations.deepten.timm.create_model", spy)
    small(pretrained_backbone=True).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["pretrained_backbone"] is False
    DeepTEN.from_pretrained(tmp_path)
    assert asked == [True, False, False]  # as asked; to be compared with on saving; on loading


def test_a_new_classifier_is_saved_as_it_is(tmp_path):
    model = small()
    model.reset_classifier(9)
    model.save_pretrained(tmp_path / "nine")
    assert DeepTEN.from_pretrained(tmp_path / "nine").fc.out_features == 9
    model.reset_classifier(0, "")
    model.save_pretrained(tmp_path / "none")
    assert torch.equal(DeepTEN.from_pretrained(tmp_path / "none")(X), model(X))


def test_weights_that_do_not_fit_are_an_error(tmp_path):
    model = small()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoding.codewords"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(RuntimeError, match=r"encoding\.codewords"):
        DeepTEN.from_pretrained(tmp_path)
    fresh = DeepTEN.from_pretrained(tmp_path, strict=False)
    assert torch.equal(fresh.fc.weight, model.fc.weight)


def test_what_is_no_json_is_not_dropped(tmp_path):
    model = small(act_layer=torch.nn.SiLU)
    folder = tmp_path / "run"
    with pytest.raises(TypeError, match=r"^DeepTEN: act_layer must be JSON to be saved, got <class .*SiLU'>$"):
        model.save_pretrained(folder)
    assert not folder.exists()
    model.save_pretrained(folder, config=model.config | {"act_layer": "silu"})
    assert torch.equal(DeepTEN.from_pretrained(folder)(X), model(X))


# timm's manners that depend on the backbone


def test_no_weight_decay_is_the_backbones_too():
    model = small("swin_tiny_patch4_window7_224", embed_dim=8, depths=(1, 1), num_heads=(1, 1))
    own = model.backbone.no_weight_decay()
    assert own
    assert model.no_weight_decay() == {"encoding.codewords", "encoding.smoothing"} | {f"backbone.{n}" for n in own}
    assert small(smoothing=0.5).no_weight_decay() == {"encoding.codewords"}


@pytest.mark.parametrize("backbone", ["test_resnet", "test_convnext", "test_efficientnet", "test_nfnet"])
@pytest.mark.parametrize("coarse", [False, True])
def test_layers_are_grouped_as_the_backbones_are(backbone, coarse):
    model = small(backbone)
    theirs = timm.models.group_parameters(model.backbone, model.backbone.group_matcher(coarse=coarse), reverse=True)
    ours = timm.models.group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    assert {key: ours[f"backbone.{key}"] for key in theirs} == theirs
    head = {ours[key] for key in ours if not key.startswith("backbone.")}
    assert len(head) == 1
    assert head.pop() >= max(theirs.values())


def test_anchors_stay_anchors():
    pattern = re.compile(_prefix_pattern(r"^stem|^bn(\d)|(?:^a|b[^.]*)\.c"))
    found = {name: bool(pattern.match(name)) for name in ("stem", "bn1", "a.c", "bb.c", "xbn1", "b..c")}
    assert not any(found.values())
    inside = {name: bool(pattern.match(f"backbone.{name}")) for name in found}
    assert inside == {"stem": True, "bn1": True, "a.c": True, "bb.c": True, "xbn1": False, "b..c": False}


def test_maps_of_a_backbone_whose_head_widens_them():
    model = small("mobilenetv3_small_050")
    with torch.no_grad():
        features, maps = model.forward_intermediates(X, [1, 3])
        assert torch.equal(features, model.forward_features(X))
        assert [map_.shape[1] for map_ in maps] == [model.feature_info[index]["num_chs"] for index in (1, 3)]
    model.prune_intermediate_layers([1])
    assert all(name.startswith("backbone.") for name, _ in model.named_parameters())


# What is refused


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"backbone": "resnet5"}, ValueError, "DeepTEN: backbone must be the name of a timm model, got 'resnet5'"),
        ({"backbone": 50}, TypeError, "DeepTEN: backbone must be the name of a timm model, got 50"),
        ({"backbone": "hf-hub:timm/a"}, ValueError, "DeepTEN: backbone must be the name of a timm model, got 'hf-hub:"),
        ({"backbone": "test_vit"}, ValueError, r"must give a map (B, C, H, W), got (1, 101, 64) from 'test_vit'"),
        ({"backbone": "inception_next_atto"}, ValueError, "got 'inception_next_atto' with {}: Cannot disable pooling"),
        (
            {"depth": 3},
            ValueError,
            "DeepTEN: backbone must take these arguments, got 'test_resnet' with {'depth': 3}: ",
        ),
        ({"num_codes": 0}, ValueError, "DeepTEN: num_codes must be a positive integer, got 0"),
        ({"rd_channels": 1.5}, TypeError, "DeepTEN: rd_channels must be a positive integer, got 1.5"),
        ({"in_chans": 0}, ValueError, "DeepTEN: in_chans must be a positive integer, got 0"),
        (
            {"smoothing": "drawn"},
            ValueError,
            'DeepTEN: smoothing must be "learned", "sampled" or a positive number, got',
        ),
        ({"global_pool": "avg"}, ValueError, """DeepTEN: global_pool must be "encoding" or "", got 'avg'"""),
        ({"global_pool": ""}, ValueError, 'DeepTEN: num_classes must be 0 where global_pool is "", got 5'),
    ],
)
def test_refusals(arguments, error, text):
    with pytest.raises(error) as raised:
        small(**arguments)
    assert text in str(raised.value)


def test_a_refused_reset_changes_nothing():
    model = small()
    before = model(X)
    with pytest.raises(ValueError, match="num_classes must be 0"):
        model.reset_classifier(3, "")
    assert (model.num_classes, model.global_pool) == (5, "encoding")
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay"])
def test_a_configuration_cannot_name_a_file_to_load(tmp_path, argument):
    with pytest.raises(
        ValueError, match=f"DeepTEN: backbone_args must not name what is loaded or from where, got {argument}"
    ):
        small(**{argument: str(tmp_path / "x.pth")})
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {argument: str(tmp_path / "x.pth")}))
    with pytest.raises(ValueError, match="DeepTEN: backbone_args must not name"):
        DeepTEN.from_pretrained(tmp_path)
