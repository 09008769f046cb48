"""Recipes side by side: what seeds decide, what a log tells, and which runs a set means."""

import json
import random
from math import gamma, pi, sqrt
from pathlib import Path
from statistics import NormalDist, mean, stdev

import pytest

from tritonbnn.compare.page import Result, markdown, summary
from tritonbnn.compare.plan import make_plan, split_flags
from tritonbnn.compare.runs import measured
from tritonbnn.compare.sets import QUANTITIES, read, shipped_sets
from tritonbnn.compare.statistics import (
    compare,
    detectable,
    pooled,
    seeds_for,
    shared_level,
    t_probability,
    t_quantile,
    verdict,
)

# From printed tables of Student's t: one-sided probability, degrees of freedom, t.
TABLE = [
    (0.975, 1, 12.706),
    (0.975, 2, 4.303),
    (0.975, 3, 3.182),
    (0.975, 4, 2.776),
    (0.975, 10, 2.228),
    (0.975, 30, 2.042),
    (0.975, 120, 1.980),
    (0.95, 7, 1.895),
    (0.995, 3, 5.841),
    (0.995, 5, 4.032),
    (0.9995, 5, 6.869),
    (0.8, 4, 0.941),
    (0.75, 1, 1.000),
]


@pytest.mark.parametrize(("probability", "freedom", "expected"), TABLE)
def test_quantiles_are_those_of_printed_tables(probability, freedom, expected):
    assert t_quantile(probability, freedom) == pytest.approx(expected, abs=6e-4)


def test_student_s_t_becomes_the_normal_distribution():
    assert t_quantile(0.975, 100_000) == pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-4)
    assert t_quantile(0.5, 3) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 13])
def test_probabilities_are_the_integral_of_the_density(freedom):
    """By Simpson's rule, whose density needs only the gamma function."""
    scale = gamma((freedom + 1) / 2) / (sqrt(freedom * pi) * gamma(freedom / 2))

    def density(x: float) -> float:
        return scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2)

    t, parts = 2.37, 2000
    inner = sum((4 if i % 2 else 2) * density(t * i / parts) for i in range(1, parts))
    integral = 2 * t / parts / 3 * (density(0) + inner + density(t))
    assert t_probability(t, freedom) == pytest.approx(integral, rel=1e-10)


def test_the_deviation_is_pooled_by_degrees_of_freedom():
    # by hand: squares 2 + 0.5 about means 2 and 6.5, over 2 + 1 degrees of freedom
    assert pooled([[1, 2, 3], [6, 7], [9]]) == (pytest.approx((2.5 / 3) ** 0.5), 3)
    deviation, freedom = pooled([[1.0], [2.0], []])
    assert (deviation != deviation, freedom) == (True, 0)


def test_seeds_are_as_many_as_tables_of_power_say():
    """For 80 % at 5 %: 64 of each for half a deviation, 17 for one, 26 for 0.8 (Cohen)."""
    assert [seeds_for(d, 1) for d in (0.5, 0.8, 1)] == [64, 26, 17]
    assert seeds_for(-1, 1) == 17
    assert seeds_for(1e-6, 1) is None
    assert seeds_for(1e6, 1) == 2


def test_a_detectable_difference_is_found_in_four_of_five_comparisons():
    """By drawing such comparisons."""
    draw, seeds, deviation = random.Random(0), 5, 0.7
    apart = detectable(deviation, seeds)
    found = 0
    for _ in range(2000):
        low, high = (
            [draw.gauss(middle, deviation) for _ in range(seeds)] for middle in (90, 90 + apart)
        )
        found += compare(("a", low), ("b", high), 0.05).decided == 1
    assert found / 2000 == pytest.approx(0.8, abs=0.04)


def test_rows_without_a_difference_are_rarely_told_apart():
    draw = random.Random(1)
    wrong = 0
    for _ in range(2000):
        low, high = ([draw.gauss(90, 1) for _ in range(3)] for _ in range(2))
        wrong += compare(("a", low), ("b", high), 0.05).decided != 0
    assert wrong / 2000 == pytest.approx(0.05, abs=0.015)


MEANS = "{} above {} in the means, but the seeds overlap"


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3], [11, 12, 13], "b above a"),
        ([11, 12, 13], [1, 2, 3], "a above b"),
        ([1, 2, 6], [3, 4, 5], MEANS.format("b", "a")),
        ([3, 4, 5], [1, 2, 6], MEANS.format("a", "b")),
        ([1, 4], [5, 8], "not decided: b above a in every seed, but these are too few"),
        ([1], [9], "not decided: one seed each shows no spread"),
        ([1, 1], [2, 2], "not decided: all seeds of a row are alike, which shows no spread"),
        ([1, 3], [0, 4], "not decided: the means are equal"),
        # many seeds decide although they overlap: t is 2.24 * sqrt(20 / 2) / 1.15
        ([1, 2, 3, 4] * 5, [2, 3, 4, 5] * 5, "b above a"),
    ],
)
def test_a_verdict_follows_from_the_seeds(a, b, expected):
    assert compare(("a", a), ("b", b), 0.05).words == expected


def test_a_margin_is_that_of_the_t_test():
    """By hand: means 2 and 5, pooled deviation 1, t of 4 degrees of freedom."""
    found = compare(("a", [1, 2, 3]), ("b", [4, 5, 6]), 0.05)
    assert (found.value, found.deviation) == (3, 1)
    assert found.margin == pytest.approx(2.776 * (2 / 3) ** 0.5, rel=1e-3)


SO, NOT_SO = (f"{so} in the means, but the seeds overlap" for so in ("so", "not so"))


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        ([1, 2], [31, 32], [61, 62], "holds"),
        ([1, 2], [61, 62], [31, 32], "does not hold"),
        ([61, 62], [1, 99], [1, 2], "does not hold"),  # by the two that are not neighbours
        ([1, 3], [2, 4], [61, 62], SO),
        ([1, 4], [2, 3], [1, 5], "not so in the means, but the seeds overlap"),
        ([1, 2], [], [3, 4], "not decided: runs are missing, or do not tell it"),
        ([1], [2], [3], "not decided: so in the means, but a row shows no spread"),
        ([1, 4], [5, 9], [60, 61], "not decided: so in the means, but the seeds are too few"),
    ],
)
def test_an_order_of_three(a, b, c, expected):
    if expected == NOT_SO:
        b = [2.4, 2.4]  # the mean of a is 2.5
    assert verdict("abc", {"a": a, "b": b, "c": c}, 0.05).words == expected


def test_tests_of_a_page_share_the_chance_of_an_error():
    assert shared_level(["ab", "abc"]) == pytest.approx(0.05 / 4)
    assert shared_level([]) == 0.05


def grid(**values: list[float]) -> Result:
    rows = {
        name: {"title": name, "epochs": {"all": 3}, "published": {}, "recipe": "digits"}
        for name in values
    }
    runs = {
        name: {str(seed): {"top1": v, "all.top1": v, "minutes": 1.0} for seed, v in enumerate(vs)}
        for name, vs in values.items()
    }
    return Result([], rows, [], max(map(len, values.values())), runs)


def test_a_table_has_mean_and_sample_deviation_and_says_what_it_can_show():
    values = {"a": [90.0, 91.0, 95.5], "b": [97.0, 99.0, 98.5]}
    text = markdown(grid(**values))
    for name, row in values.items():
        assert f"| {name} | 3 | 3 | {mean(row):.4g} ± {stdev(row):.2g} | 1 ± 0 |" in text
    deviation, _ = pooled(list(values.values()))
    assert f"a difference of {detectable(deviation, 3):.2g} points" in text
    assert "- b above a (top-1, %: b minus a is 6 ± " in text or "not decided" in text
    one = markdown(grid(a=[90.0], b=[91.0]))
    assert "One seed shows no spread: it decides nothing." in one
    assert "| a | 1 | 3 | 90 | 1 |" in one
    lone = markdown(grid(a=[90.0, 91.0]))
    assert "Verdicts" not in lone


def test_a_summary_is_json_without_nan_and_needs_no_page():
    found = summary(grid(a=[90.0], b=[91.0]))
    again = json.loads(json.dumps(found, allow_nan=False))
    assert again["rows"]["a"]["top1"] == {"mean": 90.0, "sd": None, "seeds": 1}
    assert again["orders"][0]["steps"][0]["margin"] is None
    both = grid(a=[90.0, 91.0], b=[95.0, 96.0])
    assert Result.of(json.loads(json.dumps(both.document()))) == both


def line(stage: str, epoch: int, lr: float, top1: float | None, **analysis: float) -> dict:
    return {
        "stage": stage,
        "epoch": epoch,
        "lr": lr,
        "val_top1": top1,
        "val_loss": 0.5,
        "seconds": 30.0,
        "analysis": analysis,
    }


def test_numbers_are_of_the_last_epoch_and_flips_of_those_that_move():
    log = [
        line("step1", 1, 0.0, 70.0, flip_flop=9.0),
        line("step2", 1, 1.0, 90.0, flip_flop=0.1, dead=0.5, revived=0.2, c2i_half=0.9),
        line("step2", 2, 0.5, 80.0, flip_flop=0.3, dead=0.25, revived=0.4, c2i_half=0.8),
        line("step2", 3, 0.0, 85.0, flip_flop=0.0, dead=1.0, revived=0.0, c2i_half=0.7),
    ]
    assert measured(log, ["step1", "step2"]) == pytest.approx(
        {
            "step1.top1": 70.0,
            "step2.top1": 85.0,
            "top1": 85.0,
            "best_top1": 90.0,
            "loss": 0.5,
            "flip_flop": 0.2,
            "revived": 0.3,
            "dead": 0.25,
            "c2i_half": 0.7,
            "minutes": 2.0,
        }
    )
    nothing = measured([line("all", 1, 0.0, None)], ["all"])
    assert nothing == {"loss": 0.5, "minutes": 0.5}


@pytest.mark.parametrize("name", shipped_sets())
def test_the_paper_s_numbers_stand_in_the_order_that_is_claimed(name: str):
    of = read(name)
    published = {row.name: row.published for row in of.rows}
    for claim in of.claims:
        known = [published[x] for x in claim.rising if claim.quantity in published[x]]
        values = [numbers[claim.quantity] for numbers in known]
        assert values == sorted(values), claim.text


def plan(*words: str, flags=(), **more):
    return make_plan(list(words), list(flags), seeds=2, out=Path("none"), **more)


def test_sets_share_runs_and_each_row_has_as_many_epochs():
    both = plan("optimisers", "decay", "steps")
    assert len(both.runs) == 2 * len(both.rows) == 2 * 7
    for config in both.configs.values():
        assert sum(stage.epochs for stage in config.chosen) == 32
    one, two = both.configs["one-step-decay-1e-5"], both.configs["two-step-adam"]
    assert (one.only, one.init_from, one.stage("step2").weight_decay) == ("step2", "scratch", 1e-5)
    assert [stage.weight_decay for stage in two.stages] == [5e-6, 0]
    assert [stage.optimizer.name for stage in both.configs["sgd-0.05"].stages] == ["sgd", "sgd"]
    assert [stage.lr for stage in both.configs["sgd-0.05"].stages] == [0.05, 0.05]
    short = plan("steps", total_epochs=6)
    assert [[s.epochs for s in c.chosen] for c in short.configs.values()] == [[6], [3, 3]]


def test_flags_may_stand_anywhere():
    text = "--epochs 3 a --channels-last b --seeds 4 --step1.lr 1e-3 --lr=2 --no-compile c"
    mine, flags = split_flags(text.split(), ["--seeds"])
    assert mine == ["a", "b", "--seeds", "4", "c"]
    assert " ".join(flags) == "--epochs 3 --channels-last --step1.lr 1e-3 --lr=2 --no-compile"


def test_claims_are_of_quantities_that_are_measured():
    for name in shipped_sets():
        assert {claim.quantity for claim in read(name).claims} <= set(QUANTITIES)
