import json

import pytest
import timm
import torch
import torchvision

import ctxenc
from ctxenc.__main__ import main
from ctxenc.runs.errors import UserError
from ctxenc.training.inspection import inspect_model, measure_times


def count(module):
    return sum(each.numel() for each in module.parameters())


class TestInspectModel:
    @pytest.mark.parametrize("name", ["test_efficientnet", "test_byobnet", "seresnet18"])
    def test_parameters_are_those_of_a_real_swap(self, name):
        found = inspect_model(name, swap={"num_codes": 4})
        model = timm.create_model(name)
        assert found.parameters_before == count(model)
        records = ctxenc.find_se_blocks(model)
        before = {each.name: count(model.get_submodule(each.name)) for each in records}
        ctxenc.patch_se_blocks(model, num_codes=4)
        assert found.parameters_after == count(model)
        assert [each.name for each in found.blocks] == [each.name for each in records]
        for block, record in zip(found.blocks, records, strict=True):
            assert (block.channels, block.class_name) == (record.channels, record.class_name)
            assert block.parameters_before == before[block.name]
            assert block.parameters_after == count(model.get_submodule(block.name))

    def test_macs_and_times_are_of_both_networks(self):
        found = inspect_model("seresnet18", 64)
        model = timm.create_model("seresnet18").eval()
        convolutions = [each for each in model.modules() if isinstance(each, torch.nn.Conv2d)]
        macs = [model.fc.weight.numel()]

        def count_products(module, _, out):
            macs.append(module.weight.numel() * out.shape[2] * out.shape[3])

        for each in convolutions:
            each.register_forward_hook(count_products)
        with torch.no_grad():
            model(torch.zeros(1, 3, 64, 64))
        assert found.macs_before == sum(macs)
        assert found.macs_after > found.macs_before
        times = measure_times("seresnet18", 64, {}, "cpu")
        assert times["ms_before"] > 0
        assert times["ms_after"] > 0
        with pytest.raises(UserError, match=r"cannot time .* --no-time leaves it out"):
            measure_times("resnet18", 64, {}, "cpu")

    def test_maps_follow_the_image(self):
        sizes = {size: [each.map for each in inspect_model("seresnet18", size).blocks] for size in (64, 224)}
        assert sizes[64] == [(16, 16)] * 2 + [(8, 8)] * 2 + [(4, 4)] * 2 + [(2, 2)] * 2
        assert sizes[224] == [(56, 56)] * 2 + [(28, 28)] * 2 + [(14, 14)] * 2 + [(7, 7)] * 2

    def test_torchvision(self):
        found = inspect_model("torchvision:mobilenet_v3_small", 64)
        assert found.parameters_before == count(torchvision.models.mobilenet_v3_small())
        assert len(found.blocks) == 9
        assert found.blocks[0].map == (16, 16)

    def test_a_detector_that_needs_values(self):
        found = inspect_model("torchvision:ssdlite320_mobilenet_v3_large", 320)
        assert all(block.map[0] > 0 for block in found.blocks)

    def test_empty_slots(self):
        found = inspect_model("resnet10t", 64, {"fill_empty": True})
        assert [each.class_name for each in found.blocks] == [None] * 4
        assert [each.parameters_before for each in found.blocks] == [0] * 4
        assert found.parameters_after - found.parameters_before == sum(each.parameters_after for each in found.blocks)

    def test_leaves_no_weights_in_memory(self, monkeypatch):
        seen = []
        patch = ctxenc.patch_se_blocks
        monkeypatch.setattr(
            "ctxenc.training.inspection.patch_se_blocks",
            lambda model, **swap: patch(seen.append(next(model.parameters()).device) or model, **swap),
        )
        inspect_model("seresnet50", 64)
        assert seen == [torch.device("meta")]

    @pytest.mark.parametrize(
        ("name", "size", "words"),
        [
            ("seresnet5", None, "unknown model 'seresnet5'; near names: "),
            ("torchvision:mobilenet_v3", None, "near names: torchvision:mobilenet_v"),
            ("resnet18", None, "resnet18: "),
            ("ecaresnet26t", None, "Eca"),
            ("coatnet_0_224", 100, "cannot build and run coatnet_0_224 at image size 100: "),
        ],
    )
    def test_errors(self, name, size, words):
        with pytest.raises(UserError) as caught:
            inspect_model(name, size)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)


class TestCommand:
    def test_table(self, capsys):
        assert main(["inspect", "test_efficientnet", "--num-codes", "4", "--device", "cpu"]) == 0
        lines = capsys.readouterr().out.splitlines()
        found = inspect_model("test_efficientnet", swap={"num_codes": 4})
        for line, block in zip(lines[3:], found.blocks, strict=False):
            change = 100 * (block.parameters_after / block.parameters_before - 1)
            assert line.split()[0] == block.name
            assert line.split()[-4:-2] == [f"{block.parameters_before:,}", f"{block.parameters_after:,}"]
            assert line.endswith(f" {change:+.2f} %")
        network, macs, times = lines[-3:]
        assert network.split()[:3] == ["network", f"{found.parameters_before:,}", f"{found.parameters_after:,}"]
        assert macs.split()[3:6] == ["M", f"{found.macs_before / 1e6:.1f}", f"{found.macs_after / 1e6:.1f}"]
        assert times.startswith("ms an image ")
        assert lines[0].startswith("test_efficientnet at 160x160; time: cpu, ")

    def test_no_time_does_not_run_the_networks(self, capsys, monkeypatch):
        monkeypatch.setattr("ctxenc.training.inspection.measure_times", lambda *_: pytest.fail("timed"))
        assert main(["inspect", "test_efficientnet", "--no-time"]) == 0
        out = capsys.readouterr().out
        assert "time" not in out
        assert out.splitlines()[-1].startswith("MACs an image")

    def test_json(self, capsys):
        assert main(["inspect", "test_efficientnet", "--smoothing", "0.5", "--json", "--no-time"]) == 0
        table = json.loads(capsys.readouterr().out)
        found = inspect_model("test_efficientnet", swap={"smoothing": 0.5})
        assert table["swap"]["smoothing"] == 0.5
        assert table["parameters_after"] == found.parameters_after
        assert [each["name"] for each in table["blocks"]] == [each.name for each in found.blocks]

    def test_error(self, capsys):
        assert main(["inspect", "seresnet5"]) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
