"""Accuracy over classes, and its interval."""

import pytest
import torch

from ctxenc.training.metrics import balanced_accuracy, bootstrap, interval

TARGETS = torch.tensor([0, 0, 0, 0, 1, 1, 3])


class TestBalancedAccuracy:
    def test_every_class_counts_the_same(self):
        predictions = torch.tensor([0, 0, 0, 1, 1, 0, 3])
        assert balanced_accuracy(TARGETS, predictions, 4) == pytest.approx((3 / 4 + 1 / 2 + 1) / 3)

    def test_a_class_without_samples_does_not_count_even_if_predicted(self):
        predictions = torch.tensor([2, 0, 0, 0, 1, 1, 3])
        assert balanced_accuracy(TARGETS, predictions, 5) == pytest.approx((3 / 4 + 1 + 1) / 3)

    def test_nothing_to_count(self):
        with pytest.raises(ValueError, match="at least one sample"):
            balanced_accuracy(TARGETS[:0], TARGETS[:0], 4)


class TestBootstrap:
    def test_draws_inside_each_class(self):
        scores = (TARGETS == 1).double()
        assert torch.equal(bootstrap(TARGETS, scores), torch.full((2000,), 1 / 3, dtype=torch.float64))

    def test_has_the_spread_of_a_mean(self):
        targets = torch.arange(400) % 2
        scores = (torch.arange(400) // 2 % 2).double()  # half of each class
        values = bootstrap(targets, scores, draws=4000)
        expected = (0.25 / 200 / 2) ** 0.5  # two independent means of 200
        assert float(values.std()) == pytest.approx(expected, rel=0.05)
        low, high = interval(values)
        assert (high - low) / 2 == pytest.approx(1.96 * expected, rel=0.06)
        assert float(values.mean()) == pytest.approx(0.5, abs=0.002)

    def test_follows_from_the_seed(self):
        targets = torch.arange(30) % 3
        scores = torch.rand(30, generator=torch.Generator().manual_seed(0))
        first, again, other = (bootstrap(targets, scores, seed=seed) for seed in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_leaves_the_global_generator(self):
        state = torch.get_rng_state()
        bootstrap(TARGETS, TARGETS.double())
        assert torch.equal(state, torch.get_rng_state())


def test_interval_is_central():
    low, high = interval(torch.arange(1001, dtype=torch.float64))
    assert (low, high) == pytest.approx((25, 975))
