"""Paths, texts and numbers that people give, and a finished run that shall go on."""

import codecs
import os
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet34

from tests.commands import ANALYZE, EVALUATE, TRAIN, run, write_tiny
from tests.test_bad_input import assert_one_line
from tests.test_resume import log_lines
from tritonbnn.cli import UserError
from tritonbnn.train.arguments import parse
from tritonbnn.train.config import to_toml
from tritonbnn.train.recipe import read_recipe, resolve

pytestmark = pytest.mark.slow


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_tiny(tmp_path)
    return tmp_path


def test_a_teacher_by_a_relative_path_is_found_from_another_folder(place: Path):
    torch.save(resnet34(num_classes=2).state_dict(), place / "teacher.pth")
    (place / "below").mkdir()
    argv = ("--out", place / "run", "--epochs", 1)
    given = ("tiny.toml", "--teacher", "teacher.pth", *argv)
    stopped = run(TRAIN, *given, cwd=place, mishap="SIGTERM", at_step=1)
    assert stopped.code == 75, stopped.output
    again = (place / "run" / "config.toml", *argv)  # a run's settings are a recipe
    stopped = run(TRAIN, *again, cwd=place / "below", mishap="SIGTERM", at_step=1)
    assert stopped.code == 75, stopped.output
    result = run(TRAIN, "../tiny.toml", "--teacher", "../teacher.pth", *argv, cwd=place / "below")
    assert result.code == 0, result.output


def test_home_is_home_in_every_path(place: Path):
    home = {"HOME": str(place)}
    argv = ("~/tiny.toml", "--out=~/run", "--data-dir=~/images", "--epochs", 1)
    (place / "below").mkdir()
    result = run(TRAIN, *argv, cwd=place / "below", environ=home)
    assert result.code == 0, result.output
    assert (place / "run" / "log.jsonl").exists()
    argv = ("~/run", "--data-dir=~/images")
    assert run(EVALUATE, *argv, cwd=place / "below", environ=home).code == 0
    assert run(ANALYZE, "~/run", "--out=~/page.html", cwd=place / "below", environ=home).code == 0
    argv = ("tiny.toml", "--init-from=~/run/step1", "--out=~/again", "--epochs", 1)
    result = run(TRAIN, *argv, cwd=place, environ=home)
    assert result.code == 0, result.output
    assert [p.name for p in (place / "below").iterdir()] == ["output.txt"]


def test_a_folder_named_as_home_of_nobody_is_a_folder(place: Path):
    argv = ("tiny.toml", "--out=~nobody-of-that-name/run", "--epochs", 1)
    assert run(TRAIN, *argv, cwd=place).code == 0
    assert (place / "~nobody-of-that-name" / "run").is_dir()


TEXT = '# caf\u00e9\ndataset = "digits"\nepochs = 3\n[[stage]]\nname = "all"\n'


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path: Path):
    (tmp_path / "mine.toml").write_bytes(codecs.BOM_UTF8 + TEXT.encode())
    assert parse([str(tmp_path / "mine.toml")]).config.stage("all").epochs == 3


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_utf_16_is_named(tmp_path: Path, encoding: str):
    (tmp_path / "mine.toml").write_bytes(TEXT.encode(encoding))
    with pytest.raises(
        UserError, match=r"mine\.toml: it is in UTF-16, or no text: save it as UTF-8"
    ):
        parse([str(tmp_path / "mine.toml")])


def test_the_largest_seed_trains_and_a_larger_one_is_refused(place: Path, tmp_path: Path):
    argv = ("tiny.toml", "--out", "run", "--epochs", 1, "--seed")
    assert_one_line(run(TRAIN, *argv, 2**64, cwd=place), f"--seed must be at most {2**64 - 1}")
    stopped = run(TRAIN, *argv, 2**64 - 1, cwd=place, mishap="SIGTERM", at_step=1)
    assert stopped.code == 75, stopped.output
    result = run(TRAIN, *argv, 2**64 - 1, cwd=place)
    assert result.code == 0, result.output


def test_more_epochs_for_a_finished_run(place: Path):
    argv = ("tiny.toml", "--out", "run", "--schedule", "linear")
    assert run(TRAIN, *argv, cwd=place).code == 0
    for flags, epochs in ((("--epochs", 4), 4), (("--step1.epochs", 3), 3)):
        factor = (epochs - 2) / epochs
        result = run(TRAIN, *argv, *flags, cwd=place)
        assert_one_line(
            result,
            f"step1.epochs was 2 and is {epochs}, but step2 has begun from its weights",
            f"--step2.epochs {epochs}",
            f"learning rate {2e-3 * factor:g} in epoch 3, after 0.001 in the one before",
        )
    result = run(TRAIN, *argv, "--step2.epochs", 4, cwd=place)
    assert result.code == 0, result.output
    jump = "step2, now of 4 epochs, has the learning rate 0.001 in epoch 3, after 0.001 in the one"
    assert any(line.startswith(jump) for line in result.output.splitlines())
    rates = [line["lr"] for line in log_lines(place / "run")]
    assert rates == pytest.approx([2e-3, 1e-3, 2e-3, 1e-3, 1e-3, 0.5e-3])


def test_a_path_means_the_same_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two dots lead up from where a link leads to."""
    (tmp_path / "real" / "below").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real" / "below")
    monkeypatch.chdir(tmp_path)
    config = resolve(read_recipe("images"), {"data_dir": "link/../data", "teacher": "t.pth"})
    assert config.data_dir == str(tmp_path / "real" / "data")
    assert config.stages[0].method.settings.teacher == str(tmp_path / "t.pth")
    (tmp_path / "config.toml").write_text(to_toml(config))
    monkeypatch.chdir(tmp_path / "real")
    again = resolve(read_recipe(os.path.join("..", "config.toml")))  # noqa: PTH118
    assert again.stages == config.stages
    assert again.data_dir == config.data_dir
