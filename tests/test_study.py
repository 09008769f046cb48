"""The grid of runs, and what is said of it."""

import json
from pathlib import Path
from statistics import mean, stdev

import pytest

from tests.commands import STUDY, TRAIN, Result, run, write_tiny
from tests.test_resume import assert_same_run
from tritonbnn.study.plan import HIGH, MEDIUM, NO_DECAY, STUDIES, TWO_STEP, TWO_STEP_SGD, Claim
from tritonbnn.study.summary import caution, markdown, measured, settings, verdict
from tritonbnn.train.arguments import parse
from tritonbnn.train.checkpoint import read

ONE_SEED = ("--recipe", "tiny.toml", "--seeds", 1, "--sgd-lr", 2e-3)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write_tiny(folder)
    return folder


def study(place: Path, *argv: object, **mishap) -> Result:
    return run(STUDY, *argv, *ONE_SEED, cwd=place, **mishap)


@pytest.fixture(scope="module")
def steps(place: Path) -> tuple[Path, Result]:
    """A grid of one study: two configurations of one seed."""
    result = study(place, "steps", "--out", "grid")
    assert result.code == 0, result.output
    return place / "grid", result


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_run_of_the_grid_is_what_the_training_command_gives(place: Path, steps):
    flags = "--step 2 --init-from scratch --step2.epochs 4 --step2.weight-decay 5e-6 --seed 0"
    alone = run(TRAIN, "tiny.toml", *flags.split(), "--out", "alone", cwd=place)
    assert alone.code == 0, alone.output
    one = steps[0] / "one-step-decay-5e-06-seed0"
    assert not (one / "step1").exists()
    assert log_of(one)[-1]["epoch"] == 4  # as many as 2 + 2
    ours, theirs = (read(f / "step2" / "last.safetensors").tensors for f in (one, place / "alone"))
    assert ours.keys() == theirs.keys()
    assert all((ours[k] == theirs[k]).all() for k in ours if "rng" not in k)

    both = run(TRAIN, "tiny.toml", "--step1.weight-decay", "5e-6", "--out", "both", cwd=place)
    assert both.code == 0, both.output
    assert_same_run(steps[0] / "two-step-adam-seed0", place / "both")


def test_one_step_starts_from_random_signs(steps):
    state = read(steps[0] / "one-step-decay-5e-06-seed0" / "step2" / "last.safetensors")
    bits = state.tensors["analysis.start"].numpy().view("uint8")
    ones = sum(bin(byte).count("1") for byte in bits.ravel().tolist())
    assert 0.4 < ones / (8 * bits.size) < 0.65  # padding is 1


def test_the_report_is_of_the_logs(steps):
    folder, result = steps
    document = json.loads((folder / "study.json").read_text())
    assert list(document) == ["settings", "studies", "results", "failed"]  # and not a sentence
    assert list(document["results"]) == ["one-step-decay-5e-06", "two-step-adam"]
    titles = {variant.name: variant.title for variant in STUDIES["steps"].variants}
    for name, runs in document["results"].items():
        second = [x for x in log_of(folder / f"{name}-seed0") if x["stage"] == "step2"]
        assert list(runs) == ["0"]
        found = runs["0"]
        assert found["top1"] == second[-1]["val_top1"]
        assert found["c2i_half"] == second[-1]["analysis"]["c2i_half"]
        flip_flops = [x["analysis"]["flip_flop"] for x in second[:-1]]  # the last is at rate 0
        assert found["flip_flop"] == pytest.approx(mean(flip_flops), rel=1e-12)
        assert f"| {titles[name]} | 1 | {found['top1']:.4g} |" in result.output
    assert result.output.count(" | 63.23 | 0.45 |") == 1
    assert (folder / "study.md").read_text() in result.output
    assert "1 seed at 2 + 2 epochs decides nothing about the paper's claims" in result.output
    assert "2 + 2 epochs in two steps or 4 in one" in result.output


def test_studies_share_runs(place: Path, steps):
    files = {p: p.stat().st_mtime_ns for p in steps[0].rglob("step2/last.safetensors")}
    result = study(place, "steps", "optimizers", "--out", "grid")
    assert result.code == 0, result.output
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert len(list(steps[0].rglob("step2/last.safetensors"))) == len(files) + 1
    document = json.loads((steps[0] / "study.json").read_text())
    assert document["studies"] == ["steps", "optimizers"]


@pytest.mark.parametrize("mishap", ["death", "SIGTERM"])
def test_a_killed_study_goes_on(place: Path, steps, tmp_path: Path, mishap: str):
    out = tmp_path / "grid"
    stopped = study(place, "steps", "--out", out, mishap=mishap, at_step=11)  # of the second run
    assert stopped.code == (-9 if mishap == "death" else 75)
    assert not (out / "study.json").exists()
    first = out / "one-step-decay-5e-06-seed0" / "step2" / "last.safetensors"
    before = first.stat().st_mtime_ns
    result = study(place, "steps", "--out", out)
    assert result.code == 0, result.output
    assert first.stat().st_mtime_ns == before
    assert_same_run(out / "two-step-adam-seed0", steps[0] / "two-step-adam-seed0")


def test_a_run_that_fails_is_named_and_the_rest_goes_on(place: Path, tmp_path: Path):
    argv = ("optimizers", *ONE_SEED[:-1], 1e30, "--out", tmp_path / "grid")
    result = run(STUDY, *argv, cwd=place)
    assert result.code == 1
    assert "Traceback" not in result.output
    assert "two-step-sgd-seed0 failed: step1: " in result.output
    document = json.loads((tmp_path / "grid" / "study.json").read_text())
    assert list(document["failed"]) == ["two-step-sgd-seed0"]
    assert list(document["results"]) == ["two-step-adam"]
    assert "more accurate than SGD: cannot be told: runs are missing." in result.output


def test_another_grid_in_the_folder_is_refused_and_its_report_kept(place: Path, steps):
    before = (steps[0] / "study.json").read_bytes()
    for flags in (("--epochs", 3), ("--batch-size", 16)):
        result = study(place, "steps", "--out", "grid", *flags)
        assert result.code == 2
        assert "is a run with other settings" in result.output
        assert result.output.strip().endswith("or choose another --out")
    assert (steps[0] / "study.json").read_bytes() == before


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("landscape", "invalid choice: 'landscape'"),
        ("steps --seeds 0", "--seeds: must be a whole number of at least 1, not '0'"),
        ("steps --seed 3", "--seed is what a study sets itself"),
        ("decay --step2.weight-decay=1e-4", "weight-decay=1e-4 is what a study sets itself"),
        ("steps --recipe none", "unknown recipe 'none'"),
        ("steps --epochs x", "--epochs must be a whole number, not 'x'"),
        ("steps --fresh", "--fresh has no meaning for a grid"),
        ("steps --analysis off", "--analysis off leaves nothing to compare"),
        ("", "the following arguments are required: STUDY"),
    ],
)
def test_bad_flags_are_one_line(place: Path, argv: str, message: str):
    result = run(STUDY, *argv.split(), cwd=place)
    assert result.code == 2
    assert message in result.output
    assert len(result.output.splitlines()) == 1


def test_sgd_has_its_own_learning_rate_in_both_steps():
    """Whatever the flags give Adam."""
    argv = ["--step1.lr", "2e-3", "--step2.lr", "3e-3"]
    own = TWO_STEP_SGD.flags(parse(["digits", *argv]).config, 0.05)
    config = parse(["digits", *argv, *own]).config
    assert [stage.lr for stage in config.stages] == [0.05, 0.05]


def test_torchrun_is_refused(place: Path):
    environ = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    result = run(STUDY, "steps", cwd=place, environ={**environ, "MASTER_PORT": "1"})
    assert result.code == 2
    assert "start without torchrun" in result.output


SO, NOT_SO = (f"{so} in the means, but the seeds overlap" for so in ("so", "not so"))


def grid(**values: list[float]) -> dict:
    """Results by variant's name, the seeds' values of top1."""
    return {name: {s: {"top1": v} for s, v in enumerate(vs)} for name, vs in values.items()}


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        ([1, 2], [3, 4], [5, 6], "reproduces at this scale"),
        ([1, 3], [3, 4], [5, 6], SO),
        ([3, 4], [1, 2], [5, 6], "does not reproduce at this scale"),
        ([1, 2], [5, 6], [3, 4], "does not reproduce at this scale"),
        ([1, 2], [1, 2], [3, 4], NOT_SO),
        ([1, 5], [2, 3], [6, 7], NOT_SO),
        ([3, 4], [1, 5], [1, 2], "does not reproduce at this scale"),
        ([3], [1, 2], [5, 6], "not so in one seed, which decides nothing"),
        ([1, 2], [], [3, 4], "cannot be told: runs are missing"),
        ([1, 2], [3], [5, 6], "so in one seed, which decides nothing"),
    ],
)
def test_verdicts(a: list, b: list, c: list, expected: str):
    rows = (NO_DECAY, MEDIUM, HIGH)
    results = grid(**dict(zip([row.name for row in rows], (a, b, c), strict=True)))
    assert verdict(Claim("", "top1", rows), results) == expected


TRAINED = settings(parse(["digits", "--epochs", "9"]).config, 3, 0.05)


def test_spread_is_mean_and_sample_deviation():
    values = [90.0, 91.0, 95.5]
    results = grid(**{TWO_STEP.name: values, TWO_STEP_SGD.name: [88.25]})
    text = markdown(["optimizers"], results, {}, TRAINED)
    assert f"| 3 | {mean(values):.4g} ± {stdev(values):.2g} |" in text
    assert "| 1 | 88.25 |" in text
    assert "FF ratio, 1e-3" in text


def test_what_few_seeds_and_one_learning_rate_leave_open_is_said():
    assert caution(TRAINED, ["decay"]).startswith("3 seeds at 9 + 9 epochs decide nothing")
    assert "a better one than 0.05 may bring SGD nearer" in caution(TRAINED, ["optimizers"])
    assert "learning rate" not in caution(TRAINED, ["decay"])


def test_ratios_of_sampled_updates_are_not_mixed_with_those_of_all():
    """As older logs have them, which do not tell the number of updates."""
    log = [
        {
            "stage": "step2",
            "epoch": e,
            "lr": 1.0,
            "val_top1": 50.0,
            "analysis": {"flip_flop": e / 100},
        }
        for e in (1, 2)
    ]
    old = measured(log)
    assert (old["flip_flop_sampled"], "flip_flop" in old) == (0.015, False)
    log[0]["analysis"]["updates"] = 3
    assert "flip_flop" not in measured(log)
    log[1]["analysis"]["updates"] = 3
    new = measured(log)
    assert (new["flip_flop"], "flip_flop_sampled" in new) == (0.015, False)
    higher = {**old, "flip_flop_sampled": 0.5}
    claim = Claim("", "flip_flop", (TWO_STEP, MEDIUM))
    for two_step, medium, expected, sampled in (
        (old, higher, "reproduces at this scale (by sampled updates)", True),
        (new, higher, "cannot be told: runs are missing", False),
    ):
        results = {TWO_STEP.name: dict.fromkeys("01", two_step), MEDIUM.name: {"0": medium}}
        results[MEDIUM.name]["1"] = medium
        assert verdict(claim, results) == expected
        text = markdown(["steps"], results, {}, TRAINED)
        assert ("FF ratio (sampled), 1e-3" in text) == sampled
        assert ("was not counted over all updates" in text) == sampled


def test_a_run_of_one_epoch_has_no_flip_flop():
    line = {
        "stage": "step2",
        "epoch": 1,
        "lr": 0.0,
        "val_top1": 50.0,
        "analysis": {"flip_flop": 0.0},
    }
    assert measured([line]) == {"top1": 50.0, "best_top1": 50.0}


def test_the_paper_s_numbers_stand_in_the_order_that_is_claimed():
    for study_of in STUDIES.values():
        for claim in study_of.claims:
            known = [v.published for v in claim.rising if claim.quantity in v.published]
            values = [published[claim.quantity] for published in known]
            assert values == sorted(values), claim.text
