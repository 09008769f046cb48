"""One image in a part of a batch, where the network makes one pixel of it: told beforehand."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.commands import TINY, TRAIN, run, run_two, write_tree
from tests.test_bad_input import assert_one_line
from tritonbnn.data.batches import smallest_part, train_batches
from tritonbnn.data.sources import SampleKey


class Images:
    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def batch(self, keys: Sequence[SampleKey]) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(keys), 1, 1, 1), torch.zeros(len(keys), dtype=torch.int64)


def test_the_smallest_part_is_that_of_the_epoch():
    cases = itertools.product((1, 2, 9, 16, 31), (1, 2, 4, 7, 40), (1, 2, 3, 9), (1, 2, 3))
    count = 0
    for size, batch_size, accumulation, world in cases:
        if min(size, batch_size) < world:
            continue
        options = {"seed": 0, "step": 1, "epoch": 0, "batch_size": batch_size}
        options |= {"accumulation": accumulation, "world_size": world}
        parts = [
            len(part.images)
            for rank in range(world)
            for part in train_batches(Images(size), rank=rank, **options)
        ]
        assert smallest_part(size, batch_size, accumulation, world) == min(parts)
        count += 1
    assert count > 150


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Nine images of 16 x 16, of which ReactNet-A makes one pixel."""
    write_tree(tmp_path / "images", train=3, val=1, classes="abc")
    text = f'data_dir = "{tmp_path / "images"}"\n{TINY}'.replace("birealnet_18", "reactnet_a")
    (tmp_path / "tiny.toml").write_text(text.replace("width = 0.125", "width = 0.25"))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "good"),
    [
        ("--batch-size 4", "--batch-size 3"),
        ("--batch-size 8", "--batch-size 7"),
        ("--batch-size 9 --accumulation 9", "more images, fewer processes or fewer parts"),
        ("--batch-size 9 --accumulation 5", "more images, fewer processes or fewer parts"),
        ("--batch-size 1", "--batch-size 3"),
    ],
)
def test_one_image_that_is_left_is_refused_with_a_remedy(place: Path, argv: str, good: str):
    def train(*words: object):
        return run(TRAIN, "tiny.toml", *words, "--out", "run", "--epochs", 1, cwd=place)

    result = train(*argv.split())
    assert_one_line(result, "9 training images in batches of", "a part of one image")
    assert result.output.endswith(f": use {good}\n")
    assert not list(place.rglob("*.safetensors"))
    if good.startswith("--"):
        result = train(*good.split())
        assert result.code == 0, result.output


def test_two_processes_are_refused_alike(place: Path):
    for result in run_two(TRAIN, "tiny.toml", "--batch-size", 6, "--out", "run", cwd=place):
        assert_one_line(result, "9 training images in batches of 6", "use --batch-size 5")


def test_where_more_than_a_pixel_is_left_one_image_trains(place: Path):
    argv = ("tiny.toml", "--image-size", 32, "--batch-size", 4, "--out", "run", "--epochs", 1)
    result = run(TRAIN, *argv, cwd=place)
    assert result.code == 0, result.output
