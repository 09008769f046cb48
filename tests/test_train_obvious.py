"""The obvious trainer keeps the schedule that it is there to compare."""

import json

import numpy as np
import pytest
import torch

from benchmarks import train_obvious
from benchmarks.baseline import ObviousReActNetA
from benchmarks.expert import ExpertReActNetA
from tests.pictures import random_image
from tritonbnn.cli import UserError
from tritonbnn.compute import Compute
from tritonbnn.train.arguments import parse
from tritonbnn.train.job import open_images


@pytest.fixture
def flags(tmp_path):
    """A recipe's flags for eight small images of two classes."""
    for split in ("train", "val"):
        for label in range(2):
            folder = tmp_path / "images" / split / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(4):
                random_image(10 * label + i, side=16).save(folder / f"{i}.png")
    return [
        *("images", "--data-dir", str(tmp_path / "images"), "--out", str(tmp_path / "run")),
        *("--image-size", "16", "--small-images", "--augment", "none", "--batch-size", "3"),
    ]


def test_the_expert_takes_the_obvious_networks_first_updates(flags):
    """Later ones part: where a sum rounds differently, a sign may flip."""
    config = parse([*flags, "--epochs", "1", "--batch-size", "4"]).config
    source, compute = open_images(config), Compute(torch.device("cpu"))
    lines, weights = zip(
        *(
            train_obvious.train_step(2, config, source, compute, None, network)
            for network in (ObviousReActNetA, ExpertReActNetA)
        ),
        strict=True,
    )
    assert lines[1][0]["train_loss"] == pytest.approx(lines[0][0]["train_loss"], rel=1e-4)
    assert weights[0].keys() == weights[1].keys()


def test_the_learning_rate_falls_by_epoch_to_zero(flags, tmp_path):
    assert train_obvious.main([*flags, "--epochs", "4"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["epoch"]) for line in lines] == [
        (stage, epoch) for stage in ("step1", "step2") for epoch in (1, 2, 3, 4)
    ]
    np.testing.assert_allclose(
        [ln["lr"] for ln in lines], [2.5e-3 * (1 - e / 4) for e in (1, 2, 3, 4)] * 2
    )
    assert lines[3]["train_loss"] < lines[0]["train_loss"]


def test_step_2_starts_from_step_1(flags):
    config = parse([*flags, "--epochs", "1"]).config  # at learning rate 0: no weight moves
    source, compute = open_images(config), Compute(torch.device("cpu"))
    _, first = train_obvious.train_step(1, config, source, compute, None)
    for name, value in first.items():
        if name.endswith("weight"):
            value.mul_(1.5)
    _, second = train_obvious.train_step(2, config, source, compute, first)
    for name in (n for n in first if n.endswith("weight")):
        assert torch.equal(second[name], first[name]), name


def test_what_it_cannot_train_is_refused(flags):
    with pytest.raises(UserError, match="reactnet_a"):
        train_obvious.main([*flags, "--model", "reactnet_18"])
