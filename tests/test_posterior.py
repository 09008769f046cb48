"""``evaluate --samples``: predictions by networks drawn from what IVON has learnt."""

import re
from pathlib import Path

import pytest
import torch

from tests.commands import EVALUATE, TRAIN, run, write_tiny
from tritonbnn.compute import Compute
from tritonbnn.posterior import open_sampled
from tritonbnn.train.checkpoint import read

CPU, ESS, PRIOR = Compute(torch.device("cpu"), "fp32"), 50.0, 0.25
IVON = ("--optimizer", "ivon", "--optimizer.ess", ESS, "--optimizer.prior", PRIOR, "--lr", 0.5)
STEM = "stem.0.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of a tiny recipe, by IVON and by Adam."""
    folder = tmp_path_factory.mktemp("posterior")
    write_tiny(folder)
    for name, flags in (("ivon", IVON), ("adam", ())):
        result = run(TRAIN, "tiny.toml", "--epochs", 1, "--out", name, *flags, cwd=folder)
        assert result.code == 0, result.output
    return folder


def images(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_weights_are_drawn_about_the_saved_ones_as_wide_as_the_saved_curvature_says(place: Path):
    saved = read(place / "ivon" / "step2" / "last.safetensors").tensors
    sampled, checkpoint = open_sampled(place / "ivon", CPU, 400)
    assert checkpoint.facts["stage"] == "step2"
    drawn = []
    stem = dict(sampled.network.named_parameters())[STEM]
    sampled.network.register_forward_hook(lambda *_: drawn.append(stem.detach().clone()))
    with torch.no_grad():
        sampled(images(1))
    noise = torch.stack(drawn).double() - saved[f"model.{STEM}"]
    expected = (ESS * (saved[f"optimizer.hess.{STEM}"].double() + PRIOR)).rsqrt()
    noise /= expected
    # of 400 draws a mean lies within 5 deviations of 1/20, and a variance of the root of 2/400
    assert noise.mean(0).abs().max() < 5 / 20
    assert (noise.square().mean(0) - 1).abs().max() < 5 * (2 / 400) ** 0.5
    assert torch.equal(stem, saved[f"model.{STEM}"])


def test_predictions_are_logarithms_of_the_mean_of_what_each_predicts(place: Path):
    many, _ = open_sampled(place / "ivon", CPU, 3)
    each = []
    many.network.register_forward_hook(lambda _, __, logits: each.append(logits.softmax(1)))
    with torch.no_grad():
        shares, again = many(images()).exp(), many(images()).exp()
    assert torch.equal(shares, again)  # every batch meets the same networks
    torch.testing.assert_close(shares, torch.stack(each[:3]).mean(0))
    assert (each[0] - each[1]).abs().max() > 1e-3


def test_the_command_says_which_checkpoint_and_scores_it(place: Path):
    result = run(EVALUATE, "ivon", "--samples", 4, cwd=place)
    assert result.code == 0
    assert re.search(
        r"ivon/step2/last\.safetensors: 1-bit weights, 6 images .* loss \d", result.output
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("adam", "--samples", 2), "was trained by adam, which learns no distribution of weights"),
        (("ivon/step2/best.safetensors", "--samples", 2), "holds weights alone: --samples needs"),
        (("ivon", "--samples", 2, "--engine", "packed"), "leave --engine, --step and --recipe out"),
        (("ivon", "--samples", -1), "--samples"),
        (("nowhere", "--samples", 2), "nowhere does not exist: name a checkpoint file or a run"),
        (("images", "--samples", 2), "images holds no checkpoint yet"),
    ],
)
def test_bad_input_is_one_line(place: Path, argv: tuple, message: str):
    result = run(EVALUATE, *argv, cwd=place)
    assert result.code == 2
    assert message in result.output
    assert len(result.output.strip().splitlines()) == 1
