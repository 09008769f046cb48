"""Each schedule is the curve that it says it is."""

import math

import pytest

from tritonbnn.optim import SCHEDULES


def curve(name: str, epochs: int, **settings: object) -> list[float]:
    schedule = SCHEDULES[name](**settings)
    return [schedule(epoch, epochs) for epoch in range(epochs)]


def test_adambnn_has_the_published_corners():
    """Its authors step the schedule before the first batch."""
    schedule = SCHEDULES["adambnn"]()
    assert 1.25e-3 * schedule(0, 256) == pytest.approx(0.0012451171875, rel=1e-15)
    assert 1.25e-3 * schedule(127, 256) == 6.25e-4
    assert 1.25e-3 * schedule(254, 256) == 4.8828125e-6
    assert schedule(255, 256) == 0


def test_linear_begins_at_the_full_rate():
    assert curve("linear", 4) == [1, 0.75, 0.5, 0.25]


def test_constant():
    assert curve("constant", 3) == [1, 1, 1]


def test_cosine():
    expected = [(1 + math.cos(math.pi * e / 8)) / 2 for e in range(8)]
    assert curve("cosine", 8) == pytest.approx(expected)


def test_cosine_rises_first_and_ends_above_nothing():
    """Three epochs of warm-up, then the full rate, and down towards a tenth."""
    found = curve("cosine", 9, warmup=3, least=0.1)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * e / 6)) / 2 for e in range(6)]
    assert found[3:] == pytest.approx(expected)
    assert found[-1] > 0.1


@pytest.mark.parametrize("warmup", [3, 4, 100])
def test_cosine_may_be_all_warm_up(warmup: int):
    found = curve("cosine", 3, warmup=warmup)
    assert found == pytest.approx([(e + 1) / (warmup + 1) for e in range(3)])


def test_step_drops_after_shares_of_the_epochs():
    assert curve("step", 8) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])
    found = curve("step", 10, at=(0.3, 0.31, 0.9), factor=0.5)
    assert found == pytest.approx([1, 1, 1, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25, 0.125])


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_schedule_leaves_its_range_or_remembers(name: str):
    forward = curve(name, 13)
    schedule = SCHEDULES[name]()
    assert [schedule(epoch, 13) for epoch in reversed(range(13))] == forward[::-1]
    assert all(0 <= factor <= 1 for factor in forward)
    assert 0 <= schedule(0, 1) <= 1
