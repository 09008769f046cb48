"""Every user's mistake is one line that names the thing and the remedy, with exit code 2."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from torchvision.models import resnet34

from tests.commands import EVALUATE, PREDICT, TRAIN, Result, run, write_tiny, write_tree
from tritonbnn.files import FolderLock
from tritonbnn.train.checkpoint import read


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a tiny recipe and its images."""
    write_tiny(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished tiny run in ``run``."""
    folder = tmp_path_factory.mktemp("trained")
    write_tiny(folder)
    assert run(TRAIN, "tiny.toml", "--out", "run", cwd=folder).code == 0
    return folder


def assert_one_line(result: Result, *words: str) -> None:
    """The last line is the error; before it there may be news of the run."""
    assert result.code == 2, result.output
    assert "Traceback" not in result.output
    *news, error = result.output.splitlines()
    assert error.startswith("error: ")
    assert not any(line.startswith("error") for line in news)
    for word in words:
        assert word in error


def train(place: Path, *argv: object, **options) -> Result:
    return run(TRAIN, "tiny.toml", "--out", "run", *argv, cwd=place, **options)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["digit"], "did you mean digits?"),
        (["--epoch", "3"], "did you mean --epochs?"),
        (["--epochs", "0"], "--epochs must be at least 1"),
        (["--batch-size", "0"], "--batch-size must be at least 1"),
        (["--lr", "nan"], "--lr must be a finite number"),
        (["--lr", "inf"], "--lr must be a finite number"),
        (["--width", "0.01"], "width 0.01 leaves no channels"),
        (["--image-size", "20"], "--image-size 20 does not suit the network: use a multiple of 16"),
        (["--device", "cuda"], "torch finds no CUDA device: use --device cpu"),
        (["--device", "tpu"], "unknown --device 'tpu'"),
        (["--step", "2"], "run --stage step1 first, or give --init-from"),
        (["--init-from", "nowhere"], "nowhere does not exist"),
        (["--teacher", "nowhere.pth"], "use --teacher none"),
        (["--lighting", "pca"], "lighting 'pca' needs colour images"),
        (["--data-dir", "nowhere"], "use the recipe images"),
        (["images", "--data-dir", "nowhere"], "nowhere does not exist"),
    ],
)
def test_bad_arguments(tmp_path: Path, argv: list[str], words: str):
    assert_one_line(run(TRAIN, *argv, cwd=tmp_path), words)


def test_a_step_that_cannot_be_captured_is_refused_before_anything_is_written(place: Path):
    assert_one_line(train(place, "--graph"), "--graph", "this run is on the CPU: leave it out")
    assert not (place / "run").exists()


def test_a_mistake_before_the_first_save_can_be_corrected(place: Path):
    assert_one_line(train(place, "--teacher", "nowhere.pth"), "nowhere.pth")
    assert train(place).code == 0


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing"),
        (
            dict(zip(["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"], "0101", strict=True)),
            "MASTER_ADDR missing",
        ),
        (
            {
                "RANK": "first",
                "WORLD_SIZE": "1",
                "LOCAL_RANK": "0",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": "1",
            },
            "RANK must be a whole number, not 'first'",
        ),
    ],
)
def test_torchrun_variables_half_set(place: Path, variables: dict[str, str], words: str):
    assert_one_line(train(place, environ=variables), words)


def test_output_folder_is_a_file(place: Path):
    (place / "run").write_text("mine")
    assert_one_line(train(place), "run is a file, not a folder", "choose another --out")
    assert (place / "run").read_text() == "mine"


@pytest.mark.parametrize("name", ["notes.tmp", "cache.tmp/kept", "step1/more.tmp"])
def test_files_of_the_users_in_the_output_folder_stay(place: Path, name: str):
    path = place / "run" / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    result = train(place, "--epochs", "1", "--stage", "step1")
    assert result.code == 0, result.output
    assert path.read_text() == "mine"


@pytest.mark.parametrize("name", ["config.toml", "log.jsonl"])
def test_a_file_of_the_users_that_a_run_would_replace(place: Path, name: str):
    """As a recipe that lies in the folder of its run, with all its comments."""
    (place / "run").mkdir()
    (place / "run" / name).write_text("# mine")
    assert_one_line(train(place), f"run/{name} is there already", "choose another --out")
    assert (place / "run" / name).read_text() == "# mine"


@pytest.mark.parametrize("out", ["images/train", "images/val/run", "images/train/a/run"])
def test_output_folder_is_among_the_images(place: Path, out: str):
    before = sorted(place.rglob("*"))
    result = run(TRAIN, "tiny.toml", "--out", out, cwd=place)
    assert_one_line(result, f"{out} is in", "every folder is a class", "choose another --out")
    assert [path for path in sorted(place.rglob("*")) if path.name != "output.txt"] == before
    assert train(place, "--epochs", "1", "--stage", "step1").code == 0


def test_output_folder_is_read_only(place: Path):
    (place / "run").mkdir(mode=0o500)
    if os.access(place / "run", os.W_OK):
        pytest.skip("root may write anywhere")
    assert_one_line(train(place), "cannot write to", "choose another --out")


def test_output_folder_cannot_exist(place: Path):
    """Nobody may create a folder in /proc, not even root."""
    result = run(TRAIN, "tiny.toml", "--out", "/proc/run", cwd=place)
    assert_one_line(result, "cannot create /proc/run", "choose another --out")


def test_output_folder_is_in_use(place: Path):
    (place / "run").mkdir()
    lock = FolderLock(place / "run")
    try:
        assert_one_line(train(place), f"in use by another running process (pid {os.getpid()})")
    finally:
        lock.release()
    assert train(place).code == 0


def test_full_disk_while_saving(place: Path):
    result = train(place, mishap="full disk", at_call=20)
    assert_one_line(result, "no space left to write", "run the same command again")


def test_other_settings_for_a_begun_run(trained: Path):
    result = run(TRAIN, "tiny.toml", "--out", "run", "--lr", "1e-3", "--seed", 3, cwd=trained)
    assert_one_line(
        result, "seed was 0 and is 3", "step1.lr was 0.002 and is 0.001", "start over with --fresh"
    )


def test_more_epochs_of_step_1_when_step_2_has_begun(trained: Path):
    result = run(TRAIN, "tiny.toml", "--out", "run", "--step1.epochs", 5, cwd=trained)
    assert_one_line(result, "step1.epochs was 2 and is 5, but step2 has begun")


def test_checkpoints_without_a_configuration(trained: Path, place: Path):
    shutil.copytree(trained / "run", place / "run")
    (place / "run" / "config.toml").unlink()
    assert_one_line(train(place), "holds checkpoints but no config.toml")


def test_loss_that_is_not_finite(place: Path):
    result = train(place, "--lr", "1e30")
    assert_one_line(result, "is not finite", "step1", "epoch 1", "learning rate 5e+29", "--lr")


def test_loss_that_is_not_finite_names_the_last_good_checkpoint(place: Path):
    assert train(place, "--epochs", 3, mishap="SIGTERM", at_step=1).code == 75
    last = place / "run" / "step1" / "last.safetensors"
    config = place / "run" / "config.toml"
    config.write_text(config.read_text().replace("lr = 0.002", "lr = 1e39"))
    result = train(place, "--epochs", 3, "--lr", "1e39")
    assert_one_line(result, f"the last good checkpoint is {Path('run') / 'step1' / last.name}")
    good = read(last)  # of the end of the epoch that had begun at the old rate
    assert (good.facts["epoch"], good.facts["batch"]) == (1, 0)
    assert all(tensor.isfinite().all() for tensor in good.group("model").values())


def bad_checkpoint(kind: str, trained: Path, path: Path) -> Path:
    good = (trained / "run" / "step2" / "best.safetensors").read_bytes()
    if kind == "torch file":
        torch.save({"state_dict": {}}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(print))
    elif kind != "missing":
        path.write_bytes({"empty": b"", "truncated": good[:-20], "text": b"text"}[kind])
    return path


@pytest.mark.parametrize("kind", ["empty", "truncated", "text", "pickle", "torch file", "missing"])
def test_bad_checkpoints(trained: Path, place: Path, kind: str):
    path = bad_checkpoint(kind, trained, place / "bad.safetensors")
    image = trained / "images" / "val" / "a" / "0.png"
    assert_one_line(run(EVALUATE, path, cwd=place), "bad.safetensors")
    assert_one_line(run(PREDICT, path, image, cwd=place), "bad.safetensors")
    assert_one_line(train(place, "--init-from", path), "bad.safetensors")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "reactnet_18"], "name 'birealnet_18' and not 'reactnet_18'"),
        (["--width", "0.25"], "width 0.125 and not 0.25"),
        (["--no-small-images", "--image-size", "32"], "small_images True and not False"),
    ],
)
def test_checkpoint_of_another_network(trained: Path, place: Path, argv: list[str], words: str):
    result = train(place, "--init-from", trained / "run", *argv)
    assert_one_line(result, words, "use a checkpoint of the same network")


def test_last_checkpoint_of_another_run(trained: Path, place: Path):
    """Copied over by hand: it is named, not half loaded."""
    assert train(place, "--width", 0.25, mishap="SIGTERM", at_step=1).code == 75
    shutil.copy(trained / "run" / "step1" / "last.safetensors", place / "run" / "step1")
    assert_one_line(train(place, "--width", 0.25), "width 0.125 and not 0.25")


def test_best_weights_are_no_state_to_go_on_from(trained: Path, place: Path):
    assert train(place, mishap="SIGTERM", at_step=1).code == 75
    best = trained / "run" / "step1" / "best.safetensors"
    shutil.copy(best, place / "run" / "step1" / "last.safetensors")
    assert_one_line(train(place), "holds no state to go on from", "--init-from")


def test_teacher_with_other_classes(place: Path):
    torch.save(resnet34(num_classes=3).state_dict(), place / "teacher.pth")
    assert_one_line(train(place, "--teacher", "teacher.pth"), "3 classes and the data have 2")


def test_run_without_a_checkpoint(place: Path):
    (place / "run").mkdir()
    assert_one_line(run(EVALUATE, "run", cwd=place), "run holds no checkpoint yet")


def test_data_with_other_classes(trained: Path, place: Path):
    write_tree(place / "abc", classes="abc")
    result = run(EVALUATE, trained / "run", "--data-dir", "abc", cwd=place)
    assert_one_line(result, "the data have other classes", "(3 and 2)")


@pytest.mark.parametrize("image", ["missing.png", "empty", "text.png"])
def test_bad_images_to_predict(trained: Path, place: Path, image: str):
    (place / "empty").mkdir()
    (place / "text.png").write_text("text")
    assert_one_line(run(PREDICT, trained / "run", image, cwd=place), image)


def test_a_bad_training_image(place: Path):
    (place / "images" / "train" / "a" / "0.png").write_bytes(b"")
    assert_one_line(train(place), "0.png")
    assert train(place, "--skip-bad-images").code == 0


@pytest.mark.parametrize("workers", ["-1", "many"])
def test_evaluate_checks_its_arguments(trained: Path, workers: str):
    result = run(EVALUATE, trained / "run", "--batch-size", "0", cwd=trained)
    assert_one_line(result, "--batch-size")
    result = run(EVALUATE, trained / "run", "--workers", workers, cwd=trained)
    assert_one_line(result, "--workers")
