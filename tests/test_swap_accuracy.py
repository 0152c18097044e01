"""The benchmark of accuracy: equal parameters, disjoint images, learning rates that the test set has no say in, and going on."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import swap_accuracy, swap_remedies, swap_tasks, swap_training
from benchmarks.swap_accuracy import differences, interval, markdown, train_arms
from benchmarks.swap_tasks import Budget, Task
from benchmarks.swap_training import (
    ARMS,
    EQUAL,
    QUARTER,
    SE,
    SE_WIDE,
    choose_lr,
    part,
    start_network,
    train_epochs,
)
from ctxenc.encoding import Encoding
from tests.training.small_runs import make_fashion

TINY = Budget("digits", 64, 32, 1, 16)


@pytest.fixture
def few(monkeypatch):
    """Few test images, since those of the whole set at five sizes take longer than a training."""

    def task(budget, seed, folder):
        whole = swap_tasks.digits(budget, seed)
        return replace(whole, test=(whole.test[0][:24], whole.test[1][:24]))

    monkeypatch.setitem(swap_tasks.TASKS, "digits", task)


def parameters(arm):
    return swap_training.parameters(start_network(arm, 28, 0))


@pytest.mark.parametrize("arm", [arm for arm in ARMS.values() if arm.block == "context"], ids=lambda arm: arm.name)
def test_parameters_agree_with_those_of_se(arm):
    """At equal parameters, and concat at C / 4 with its wide SE; the "mean" block at C / 4 has as many by itself."""
    assert parameters(arm) == pytest.approx(parameters(ARMS[arm.reference]), rel=0.03)


def test_parameters_that_cannot_agree():
    with pytest.raises(AssertionError, match="parameters must agree within 3 %"):
        swap_training.solve_share(replace(EQUAL[2], num_codes=512))


def test_blocks_of_the_papers_width():
    network = start_network(QUARTER[3], 28, 0)
    blocks = [getattr(network, f"layer{stage}")[place].se for stage in (1, 2, 3) for place in (0, 1)]
    assert [block.rd_channels for block in blocks] == [4, 4, 8, 8, 16, 16]
    assert {block.pool for block in blocks} == {"concat"}
    se = start_network(SE, 28, 0)
    assert [getattr(se, f"layer{stage}")[0].se.fc1.out_channels for stage in (1, 2, 3)] == [4, 8, 16]


def test_arms_start_alike_outside_the_blocks():
    plain = start_network(ARMS["no attention"], 28, 3).state_dict()
    for arm in (SE, EQUAL[0], EQUAL[3]):
        own = start_network(arm, 28, 3).state_dict()
        assert len(own) > len(plain)
        assert all(torch.equal(own[name], plain[name]) for name in plain)
    assert not torch.equal(start_network(SE, 28, 4).conv1.weight, plain["conv1.weight"])


def test_arms_see_the_same_images_in_the_same_order():
    task = swap_tasks.digits(TINY, 0)
    seen = {}
    for arm in (SE, EQUAL[3]):
        network = start_network(arm, TINY.size, 0)
        own = seen.setdefault(arm.name, [])

        def keep(module, x, own=own):
            if module.training:
                own.append(x[0].clone())

        network.register_forward_pre_hook(keep)
        list(train_epochs(network, task, 2, 0.01, 0))
    one, other = (torch.stack(batches) for batches in seen.values())
    assert torch.equal(one, other)
    assert not torch.equal(one[0], one[1])  # another order in the second epoch


def values(images):
    return sorted((images[:, 0, 0, 0] * 90 + 72.9).round().int().tolist())


def test_training_held_out_and_test_images_are_disjoint(tmp_path):
    folder = str(make_fashion(tmp_path, True))
    tasks = [swap_tasks.fashion_mnist(Budget("fashion_mnist", 12, 8, 1, 28), seed, folder) for seed in (0, 1)]
    for task in tasks:
        assert sorted(values(task.train[0]) + values(task.held_out[0])) == [*range(20)]
        assert values(task.test[0]) == [*range(10)]  # of the other file
        for images, labels in (task.train, task.held_out, task.test):
            assert [value % 10 for value in (images[:, 0, 0, 0] * 90 + 72.9).round().int().tolist()] == labels.tolist()
    assert values(tasks[0].train[0]) != values(tasks[1].train[0])


def test_digits_are_disjoint(monkeypatch):
    monkeypatch.setattr(
        swap_tasks.F, "interpolate", lambda images, *_, **__: torch.arange(len(images)).view(-1, 1, 1, 1)
    )
    task = swap_tasks.digits(TINY, 5)
    numbers = [part[0].flatten().tolist() for part in (task.train, task.held_out, task.test)]
    assert [len(each) for each in numbers] == [64, 32, 719]
    assert len({number for own in numbers for number in own}) == 64 + 32 + 719


def test_photographs_are_cut_into_disjoint_regions():
    """Of a photograph whose pixels count: no pixel of a test tile, and none in two regions."""
    pixels = np.arange(96 * 300, dtype=np.int32).reshape(96, 300)
    for wide in (Image.fromarray(pixels), Image.fromarray(pixels.T.copy())):
        parts = [set(np.asarray(part).ravel().tolist()) for part in swap_tasks._two_thirds(wide)]
        assert len(parts[0]) == 2 * len(parts[1]) == 96 * 200
        assert not parts[0] & parts[1]


def test_seeds_draw_other_crops_and_share_the_test_tiles():
    budget = replace(swap_tasks.BUDGETS["photographs"], train=34, held_out=17)
    one, again, other = (swap_tasks.photographs(budget, seed) for seed in (0, 0, 1))
    assert [len(part[0]) for part in (one.train, one.held_out)] == [34, 17]
    assert torch.equal(one.train[0], again.train[0])
    assert not torch.equal(one.train[0], other.train[0])
    assert torch.equal(one.test[0], other.test[0])
    assert one.train[1].bincount().tolist() == [2] * 17


def codebooks(remedy, codewords):
    """Set the codewords of an arm's network, apply the remedy after its first epoch, and return what they are then."""
    network = start_network(replace(EQUAL[0], remedy=remedy), 16, 0)
    for module in network.modules():
        if isinstance(module, Encoding):
            with torch.no_grad():
                module.codewords.copy_(codewords(module.codewords))
    images = swap_tasks.digits(TINY, 0).train[0]
    swap_remedies.apply_after_epoch(remedy, 1, network, images, torch.Generator().manual_seed(0))
    return network, [module for module in network.modules() if isinstance(module, Encoding)]


def test_a_restart_moves_idle_codewords_alone():
    def hide_the_last(codewords):
        return torch.cat([codewords[:-1], torch.full_like(codewords[-1:], 1e3)])

    before = [each.codewords.clone() for each in codebooks("", hide_the_last)[1]]
    for own, each in zip(before, codebooks("restart", hide_the_last)[1], strict=True):
        assert torch.equal(each.codewords[:-1], own[:-1])
        assert each.codewords[-1].abs().max() < 100


def test_kmeans_moves_codewords_onto_features():
    network, layers = codebooks("k-means", lambda codewords: codewords + 50)
    pixels = swap_remedies.pixels_of(network, swap_tasks.digits(TINY, 0).train[0])
    for layer in layers:
        assert torch.cdist(layer.codewords, pixels[layer]).min(1).values.max() < 5


def test_photographs_have_seventeen_classes():
    budget = replace(swap_tasks.BUDGETS["photographs"], train=68, held_out=17, epochs=1, size=16)
    row = swap_training.train_part(SE, budget, 0.01, 0, "")
    assert math.isfinite(row["test"]["cross_entropy"])
    assert start_network(SE, 16, 0, swap_tasks.CLASSES["photographs"]).fc.out_features == 17


def test_more_images_than_there_are():
    with pytest.raises(SystemExit, match="digits has 1078 training images, of which 1100 were asked for"):
        swap_tasks.digits(replace(TINY, train=1068), 0)


def test_the_learning_rate_is_chosen_without_the_test_set(tmp_path, monkeypatch, few):
    """The same choice whatever the test set says, and where it cannot be looked at."""
    entropies = {0.1: (0.5, 0.6), 0.01: (0.9, 0.1), 0.001: (0.6, 0.6)}
    parts = [
        {"lr": lr, "seed": seed, "held_out": {"cross_entropy": entropy}}
        for lr, own in entropies.items()
        for seed, entropy in enumerate(own)
    ]
    assert choose_lr(parts) == 0.01
    task = swap_tasks.TASKS["digits"](TINY, 0, "")
    lrs, chosen = (0.01, 1e-6), []
    for labels in (task.test[1], 9 - task.test[1]):
        changed = Task(task.train, task.held_out, (task.test[0], labels))
        monkeypatch.setitem(swap_tasks.TASKS, "digits", lambda *_, own=changed: own)
        rows = train_arms([SE], TINY, 1, lrs, "", tmp_path / str(len(chosen)))
        chosen.append(rows[0]["lr"])
    assert chosen[0] == chosen[1]


def test_a_run_goes_on_to_the_same_result(tmp_path, monkeypatch, few):
    arms = [SE, EQUAL[3]]
    whole = train_arms(arms, TINY, 2, (0.01,), "", tmp_path / "whole")
    trained = []
    real = swap_training.train_part

    def stop_after_two(*args):
        if len(trained) == 2:
            raise KeyboardInterrupt
        trained.append(args)
        return real(*args)

    monkeypatch.setattr(swap_training, "train_part", stop_after_two)
    with pytest.raises(KeyboardInterrupt):
        train_arms(arms, TINY, 2, (0.01,), "", tmp_path / "parts")
    assert len([*(tmp_path / "parts").rglob("*")]) == 1 + 2  # the folder, and no half-written file
    monkeypatch.setattr(swap_training, "train_part", lambda *args: trained.append(args) or real(*args))
    assert train_arms(arms, TINY, 2, (0.01,), "", tmp_path / "parts") == whole
    assert len(trained) == len(whole) == 4  # none twice
    texts = [
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*.json")} for name in ("whole", "parts")
    ]
    assert texts[0] == texts[1]


def test_parts_of_another_budget_are_refused(tmp_path, few):
    part(SE, TINY, 0.01, 0, "", tmp_path)
    with pytest.raises(SystemExit, match="is of another budget"):
        part(SE, replace(TINY, held_out=100), 0.01, 0, "", tmp_path)


def test_bits_of_codebooks(tmp_path, few):
    row = part(EQUAL[3], TINY, 0.01, 0, "", tmp_path)
    assert len(row["bits_of_blocks"]) == 6
    assert all(-1e-9 <= bits <= math.log2(16) for bits in row["bits_of_blocks"].values())
    assert part(SE, TINY, 0.01, 0, "", tmp_path)["bits"] is None


class TestBits:
    def bits(self, smoothing, num_codes=4):
        """Codewords at the corners of a square and pixels on them."""
        network = torch.nn.Sequential(swap_training.Encoding(2, num_codes))
        corners = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
        network[0].codewords.data.copy_(corners)
        network[0].smoothing.data.fill_(smoothing)
        return swap_training.codebook_bits(network, corners.T[None, :, :, None])

    def test_all_where_each_pixel_has_its_own(self):
        assert self.bits(1e3) == [pytest.approx(2)]

    def test_none_where_all_are_shared(self):
        assert self.bits(0.0) == [pytest.approx(0, abs=1e-9)]


def rows_of(name, scores):
    return [
        {"arm": name, "seed": seed, "test": {"accuracy": score}, "scales": {"2.0": {"accuracy": score / 2}}}
        for seed, score in enumerate(scores)
    ]


def test_differences_are_between_equal_seeds():
    rows = rows_of("SE", [0.5, 0.6, 0.7]) + rows_of("mean, paper", [0.6, 0.8])[::-1]
    assert differences(rows, "mean, paper", "SE") == pytest.approx([0.1, 0.2])
    assert differences(rows, "mean, paper", "SE", scale="2.0") == pytest.approx([0.05, 0.1])


def test_the_interval_is_students():
    assert interval([1.0, 2.0, 3.0]) == pytest.approx(
        (2, 4.302653 / math.sqrt(3))
    )  # t of 0.975 with two degrees of freedom
    assert interval([1.0]) == (1, math.inf)


def test_the_command_and_its_report(tmp_path, capsys, few, monkeypatch):
    monkeypatch.setitem(swap_accuracy.BUDGETS, "digits", TINY)
    given = ["--data", "digits", "--arms", "SE", "concat, spread, C/4", "SE, wide", "--lrs", "0.01", "0.003"]
    given += ["--seeds", "2", "--runs", str(tmp_path / "runs")]
    swap_accuracy.main([*given, "--out", str(tmp_path / "one.json")])
    result = json.loads((tmp_path / "one.json").read_text())
    assert [(row["arm"], row["seed"]) for row in result["rows"][:3]] == [(name, 0) for name in given[3:6]]
    assert len(result["rows"]) == 6
    assert {"torch", "timm"} <= result["environment"]["versions"].keys()
    assert (tmp_path / "one.png").stat().st_size > 10_000
    table = markdown(result)
    assert table in capsys.readouterr().out
    assert table.count("| concat, spread, C/4 |") == 2  # accuracy, and accuracy by size
    swap_accuracy.main([*given, "--report", "--out", str(tmp_path / "two.json")])
    again = json.loads((tmp_path / "two.json").read_text())
    assert sorted(again["rows"], key=str) == sorted(result["rows"], key=str)


def test_a_result_is_continued_without_its_files(tmp_path, few, monkeypatch):
    monkeypatch.setitem(swap_accuracy.BUDGETS, "digits", TINY)
    given = ["--data", "digits", "--arms", "SE", "mean, paper", "--lrs", "0.01", "0.003"]
    swap_accuracy.main([*given, "--seeds", "1", "--runs", str(tmp_path / "a"), "--out", str(tmp_path / "one.json")])
    more = ["--seeds", "2", "--runs", str(tmp_path / "b"), "--continue", str(tmp_path / "one.json")]
    swap_accuracy.main([*given, *more, "--out", str(tmp_path / "two.json")])
    first, both = (json.loads((tmp_path / name).read_text())["rows"] for name in ("one.json", "two.json"))
    assert both[:2] == first
    assert [row["seed"] for row in both] == [0, 0, 1, 1]
    assert len(list((tmp_path / "b").rglob("*.json"))) == 4  # no other learning rate was tried again
    with pytest.raises(SystemExit, match="is of another budget"):
        swap_accuracy.main([*given, *more, "--epochs", "7", "--out", str(tmp_path / "three.json")])


def test_a_report_on_nothing(tmp_path):
    with pytest.raises(SystemExit, match="has no finished arm of digits"):
        swap_accuracy.main(["--data", "digits", "--report", "--runs", str(tmp_path), "--out", str(tmp_path / "x.json")])


def test_the_wide_se_is_wider():
    assert parameters(SE_WIDE) > 1.2 * parameters(SE)
