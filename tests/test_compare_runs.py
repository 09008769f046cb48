"""``python -m tritonbnn.compare``: real runs, what ends them, and what bad input gives."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import pytest

from tests.commands import COMPARE, ROOT, TRAIN, Result, run, write_tiny
from tests.test_resume import assert_same_run
from tritonbnn.files import FolderLock

pytestmark = pytest.mark.slow

SET = ("both.toml", "--seeds", 2)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three recipes of the same images, and a set of two of them."""
    folder = tmp_path_factory.mktemp("compare")
    text = write_tiny(folder).read_text().replace("epochs = 2", "epochs = 1")
    single = text.partition("[step1]")[0] + '[[stage]]\nname = "all"\n'
    (folder / "tiny.toml").write_text(text)
    (folder / "single.toml").write_text(single)
    (folder / "copy.toml").write_text(single)
    (folder / "wild.toml").write_text(single.replace("2e-3", '1e30\nschedule = "linear"'))
    (folder / "both.toml").write_text(
        'title = "Two of them"\nrecipe = "tiny.toml"\n'
        '[[row]]\nname = "tiny"\ntitle = "two stages"\nflags = "--lr 8e-3"\n'
        '[[row]]\nname = "single"\nrecipe = "single.toml"\npublished = { top1 = 12.5 }\n'
        '[[claim]]\ntext = "one stage is better"\nrising = ["tiny", "single"]\n'
    )
    return folder


def side_by_side(place: Path, *argv: object, **mishap) -> Result:
    return run(COMPARE, *argv, cwd=place, **mishap)


@pytest.fixture(scope="module")
def compared(place: Path) -> tuple[Path, Result]:
    """Both recipes of the set from two seeds."""
    result = side_by_side(place, *SET, "--out", "out", "--json", "r.json")
    assert result.code == 0, result.output
    return place / "out", result


def log_of(folder: Path) -> list[dict]:
    return [json.loads(text) for text in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_is_what_the_training_command_gives(place: Path, compared):
    alone = run(TRAIN, "tiny.toml", "--lr", "8e-3", "--seed", 1, "--out", "alone", cwd=place)
    assert alone.code == 0, alone.output
    assert_same_run(compared[0] / "tiny-seed1", place / "alone")


def test_the_result_is_of_the_logs(place: Path, compared):
    folder, result = compared
    document = json.loads((place / "r.json").read_text())
    assert document == json.loads((folder / "compare.json").read_text())
    for name, title in (("tiny", "tiny: two stages"), ("single", "single")):
        top1 = [log_of(folder / f"{name}-seed{seed}")[-1]["val_top1"] for seed in (0, 1)]
        assert [document["values"][name][seed]["top1"] for seed in "01"] == top1
        assert document["summary"]["rows"][name]["top1"]["mean"] == pytest.approx(mean(top1))
        row = next(x for x in result.output.splitlines() if x.startswith(f"| {title} |"))
        assert f"{mean(top1):.4g} ± {stdev(top1):.2g}" in row
    assert "step1, top-1, % | step2, top-1, % | all, top-1, %" in result.output
    assert document["command"].startswith("python -m tritonbnn.compare both.toml")
    assert (folder / "compare.md").read_text() in result.output
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_set_has_its_claims_and_the_paper_s_numbers(compared):
    output = compared[1].output
    assert "# Two of them" in output
    assert "| paper: top-1, % |" in output
    assert "| 12.5 |" in output
    assert "- One stage is better: " in output


def test_finished_runs_are_not_run_again_and_a_new_recipe_joins(place: Path, compared):
    files = [*compared[0].rglob("last.safetensors"), *compared[0].glob("*.log")]
    before = {path: path.stat().st_mtime_ns for path in files}
    argv = ("copy.toml", "both.toml", "--seeds", 1, "--out", "out", "--lr", "1e-3")
    refused = side_by_side(place, *argv)
    assert "--lr is what row tiny sets itself" in refused.output
    (place / "third.toml").write_text((place / "copy.toml").read_text().replace("2e-3", "3e-3"))
    result = side_by_side(place, "third.toml", "single.toml", "--seeds", 1, "--out", "out")
    assert result.code == 0, result.output
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert (compared[0] / "third-seed0" / "all" / "last.safetensors").exists()
    assert "one seed shows no spread, so it decides nothing" in result.output
    assert "not decided: one seed each" in result.output


def test_a_damaged_log_is_mended_and_what_cannot_be_is_named(place: Path, compared, tmp_path: Path):
    out = shutil.copytree(compared[0], tmp_path / "out")
    argv = (*SET, "--out", out)
    good = (out / "tiny-seed0" / "log.jsonl").read_bytes()
    (out / "tiny-seed0" / "log.jsonl").write_bytes(good[:-30])
    for file in (out / "single-seed1" / "all").glob("*.safetensors"):
        file.write_bytes(b"junk")
    (out / "single-seed1" / "log.jsonl").write_text("{")
    result = side_by_side(place, *argv)
    assert result.code == 1, result.output
    assert (out / "tiny-seed0" / "log.jsonl").read_bytes() == good
    assert "single-seed1 failed: " in result.output
    assert "Traceback" not in result.output
    document = json.loads((out / "compare.json").read_text())
    assert list(document["failed"]) == ["single-seed1"]
    assert list(document["values"]["single"]) == ["0"]


def test_a_run_that_fails_is_named_and_the_rest_goes_on(place: Path, compared, tmp_path: Path):
    out = shutil.copytree(compared[0], tmp_path / "out")
    result = side_by_side(place, "wild.toml", "single.toml", "--seeds", 1, "--out", out)
    assert result.code == 1
    assert "Traceback" not in result.output
    assert "wild-seed0 failed: all: " in result.output
    document = json.loads((out / "compare.json").read_text())
    assert [name for name, runs in document["values"].items() if runs] == ["single"]
    assert "not decided: runs are missing" in result.output


def test_a_run_ends_when_the_pipe_from_its_comparison_closes(tmp_path: Path):
    (tmp_path / "forever.py").write_text(
        "import time\n\ndef main(argv):\n    print(*argv, flush=True)\n    time.sleep(100)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "tritonbnn.compare.child", "forever", "--seed", "3"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "--seed 3\n"
    assert process.poll() is None
    process.stdin.close()
    assert process.wait(60) == -signal.SIGTERM


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_killed_comparison_goes_on(place: Path, compared, tmp_path: Path, name: str):
    """As from a shell: its run ends with it, and the next one takes its place."""
    out = shutil.copytree(compared[0], tmp_path / "out")
    shutil.rmtree(out / "tiny-seed0")
    for path in out.glob("compare.*"):
        path.unlink()
    argv = ["both.toml", "--seeds", "1", "--out", str(out)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "tritonbnn.compare", *argv],
            cwd=place,
            env=environ,
            stderr=said,
            stdout=said,
        )
        deadline = time.monotonic() + 120
        while not (out / "tiny-seed0" / ".lock").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.Signals[name])
        code = process.wait(120)
    text = (tmp_path / "said").read_text()
    assert code == {"SIGTERM": 75, "SIGKILL": -9}[name], text
    assert name == "SIGKILL" or "run the same command again to go on" in text
    assert not (out / "compare.json").exists()
    result = side_by_side(place, *argv)
    assert result.code == 0, result.output
    assert_same_run(out / "tiny-seed0", compared[0] / "tiny-seed0")


def test_a_result_replaces_no_file_of_another_kind(place: Path):
    before = (place / "single.toml").read_bytes()
    argv = ("single.toml", "--seeds", 1, "--json", "single.toml", "--out", "replaced")
    result = side_by_side(place, *argv)
    assert result.code == 2
    assert result.output == (
        "error: --json single.toml exists and does not end in .json: name another file\n"
    )
    assert (place / "single.toml").read_bytes() == before
    assert not (place / "replaced").exists()


def test_runs_among_the_images_are_refused(place: Path):
    result = side_by_side(place, "single.toml", "--seeds", 1, "--out", "images/train")
    assert result.code == 2
    assert "images/train is in train/ of the data" in result.output
    assert {path.name for path in (place / "images/train").iterdir()} == {"a", "b"}


def test_two_comparisons_do_not_share_a_folder(place: Path, compared):
    lock = FolderLock(compared[0])
    try:
        result = side_by_side(place, *SET, "--out", "out")
    finally:
        lock.release()
    assert result.code == 2
    assert "out is in use by another running process (pid " in result.output
    assert len(result.output.splitlines()) == 1


def test_other_settings_or_other_code_in_the_folder_are_refused(place: Path, compared):
    before = (compared[0] / "compare.json").read_bytes()
    argv = (*SET, "--out", "out")
    for flags in (("--epochs", 2), ("--batch-size", 4)):
        result = side_by_side(place, *argv, *flags)
        assert result.code == 2
        assert "is a run with other settings: " in result.output
        assert result.output.strip().endswith("or start over with --fresh")
        assert len(result.output.splitlines()) == 1
    path = compared[0] / "tiny-seed1" / "environment.json"
    kept = path.read_text()
    facts = json.loads(kept)
    assert len(facts["code"].split()[0]) == 12
    try:
        path.write_text(json.dumps({**facts, "code": "0123456789ab with torch 1.0"}))
        result = side_by_side(place, *argv)
    finally:
        path.write_text(kept)
    assert result.code == 2
    assert "tiny-seed1 is a run of other code (0123456789ab with torch 1.0 and not" in result.output
    assert len(result.output.splitlines()) == 1
    path = compared[0] / "single-seed0" / "config.toml"
    kept = path.read_text()
    try:
        path.write_text(kept[:-9])
        result = side_by_side(place, *argv)
    finally:
        path.write_text(kept)
    assert result.code == 2
    assert "single-seed0 is no run that can be read (" in result.output
    assert len(result.output.splitlines()) == 1
    assert (compared[0] / "compare.json").read_bytes() == before


def test_fresh_starts_over_beside_the_old_one(place: Path, compared):
    argv = ("single.toml", "--seeds", 1, "--out", "out", "--fresh", "--analysis", "off")
    result = side_by_side(place, *argv)
    assert result.code == 0, result.output
    assert (place / "out-2" / "single-seed0" / "log.jsonl").exists()
    assert "FF ratio, 1e-3" not in result.output


@pytest.mark.parametrize("at_call", [1, 2, 3, 4, 5, 6])
def test_a_full_disk_is_one_line(place: Path, compared, tmp_path: Path, at_call: int):
    """While the result is written; what was there before is whole."""
    out = shutil.copytree(compared[0], tmp_path / "out")
    argv = (*SET, "--out", out, "--json", tmp_path / "r.json")
    result = side_by_side(place, *argv, mishap="full disk", at_call=at_call)
    assert result.code == 2, result.output
    assert "Traceback" not in result.output
    assert "no space left to write" in result.output.splitlines()[-1]
    json.loads((out / "compare.json").read_text())


ROW = 'title = "x"\n[[row]]\nname = "a"\nrecipe = "digits"\n'


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "the following arguments are required: RECIPE"),
        ("digit", "unknown recipe or set 'digit': choose from bop-cifar10"),
        ("digit", "(did you mean digits?)"),
        ("none.toml", "none: cannot read recipe none.toml"),
        ("single.toml single.toml", "single.toml is named twice"),
        ("single.toml ./single.toml", "two recipes are called single: rename one of the files"),
        ("digits tiny.toml", "scores on different images do not compare"),
        ("single.toml copy.toml", "copy and single are the same run: leave one out"),
        ("single.toml --seeds 0", "--seeds: must be a whole number of at least 1, not '0'"),
        ("single.toml --seeds 100000", "--seeds: must be at most 1000, not 100000"),
        ("single.toml --recipe digits", "--recipe is for sets, and only recipes are named"),
        ("single.toml --seed 3", "--seed is what a comparison sets itself"),
        ("steps --epochs 4", "--epochs is what row one-step-decay-5e-6 sets itself: use --total"),
        ("steps --step1.weight-decay=1", "--step1.weight-decay is what row"),
        ("steps --total-epochs 3", "two-step-adam: 3 epochs do not split over its stages"),
        ("single.toml --epochs x", "single: --epochs must be a whole number, not 'x'"),
        ("single.toml --epoks 3", "unknown argument --epoks"),
        ("single.toml --epochs", "argument --epochs: expected one argument"),
        ("single.toml --out single.toml", "single.toml is a file, not a folder"),
        ("single.toml --json .", "cannot write .: it is a folder; name a file"),
    ],
)
def test_bad_input_is_one_line(place: Path, argv: str, message: str):
    result = side_by_side(place, *argv.split())
    assert result.code == 2, result.output
    assert message in result.output
    assert len(result.output.splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ROW + ROW[12:], "has two rows 'a'"),
        (ROW + "flag = '--lr 1'\n", "unknown key 'flag' (did you mean flags?)"),
        (ROW + "flags = '--lr \"'\n", "flags of row a cannot be read"),
        (ROW + "flags = 3\n", "flags is 3, which is no str"),
        (ROW + "published = { top = 3 }\n", "published top: give numbers of top1"),
        (ROW + "[[claim]]\nrising = ['a', 'b']\n", "a claim is about 'b', which is no row"),
        (ROW + "[[claim]]\nrising = ['a']\n", "a claim needs two rows or more"),
        (ROW + "[[claim]]\nquantity = 'top5'\nrising = []\n", "quantity top5: choose from top1"),
        ("[[row]]\nname = 'a'\n", "row a has no recipe"),
        ("row = 3\n", "row is 3, which is no list"),
        ("row = [3]\n", "a row must be a table"),
        ("[[row]]\nname = '../a'\n", "has a row named '../a'"),
        ("total_epochs = 0\n" + ROW[12:], "total_epochs must be at least 1"),
    ],
)
def test_a_bad_set_is_one_line(tmp_path: Path, text: str, message: str):
    (tmp_path / "set.toml").write_text(text)
    result = side_by_side(tmp_path, "set.toml")
    assert result.code == 2, result.output
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_torchrun_is_refused(place: Path):
    environ = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    result = side_by_side(place, "single.toml", environ={**environ, "MASTER_PORT": "1"})
    assert result.code == 2
    assert "start it without torchrun" in result.output
