"""The whole measurement: what it runs, skips, stops, goes on with and reports."""

import json
import os
import tarfile
import time

import pytest
import torch

from benchmarks import parts, suite, tables
from benchmarks.parts import MINUTES, Part
from tritonbnn import cli
from tritonbnn.kernels import provenance

TINY = ["--device", "cpu", "--tiny"]


def timeit(statement):
    """A part that runs a statement, without importing torch."""
    return ("timeit", "-n", "1", "-r", "1", statement)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so_and_a_dry_run_shows_the_plan(capsys):
    with pytest.raises(cli.UserError, match="no CUDA device here") as caught:
        suite.main([])
    assert "\n" not in str(caught.value)
    assert suite.main(["--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "compute-sanitizer" not in out.splitlines()[-1]
    assert "about" in out.splitlines()[-1]


def test_parts_end_in_time_and_write_files_of_their_own(tmp_path):
    for cuda, tiny in ((True, False), (False, False), (False, True)):
        found = parts.parts(tmp_path, tmp_path, cuda=cuda, tiny=tiny, fashion=None)
        assert max(part.minutes for part in found) <= MINUTES
        for names in ([p.name for p in found], [p.result for p in found if p.result]):
            assert len(names) == len(set(names))
        for part in found:
            assert (part.result is None) == ("--json" not in part.command)


def test_the_readmes_figures_are_a_suite_of_their_own(tmp_path, capsys):
    flags = ["--device", "cpu", "--figures", "--dry-run", "--out", str(tmp_path)]
    assert suite.main(flags) == 0
    out = capsys.readouterr().out
    files = [*tables.STEP_FILES.values(), *tables.DIGITS_FILES.values(), tables.PEAK, tables.LAYERS]
    for name in (*files, *tables.ONE_THREAD_FILES.values()):
        assert f"{tmp_path}/{name}" in out
    assert "benchmarks.report" in out
    assert "tests-kernels" not in out
    assert "benchmarks.compare" not in out


@pytest.mark.bench
def test_the_real_thing_at_a_tiny_size_and_again(tmp_path, capfd):
    """A part runs once, is not run again, and is run again if its result is gone."""
    flags = [*TINY, "--out", str(tmp_path), "--only", "layers-forward"]
    assert suite.main(flags) == 0
    out = capfd.readouterr().out
    assert "1 of 1 parts, about" in out
    assert "channel_moments" in out  # what the part printed is passed on, and kept
    assert "channel_moments" in (tmp_path / "log" / "layers-forward.log").read_text()
    state = json.loads((tmp_path / "suite.json").read_text())["layers-forward"]
    assert (state["exit_code"], state["commit"]) == (0, provenance.commit())
    assert json.loads((tmp_path / "layers_forward.json").read_text())["rows"]
    assert suite.main([*flags, "--dry-run"]) == 0
    assert "0 of 1 parts" in capfd.readouterr().out
    assert suite.main([*flags, "--dry-run", "--fresh"]) == 0
    assert "1 of 1 parts" in capfd.readouterr().out
    (tmp_path / "layers_forward.json").unlink()
    assert suite.main([*flags, "--dry-run"]) == 0
    assert "1 of 1 parts" in capfd.readouterr().out


def test_a_changed_source_or_table_makes_a_part_stale(tmp_path, monkeypatch):
    for name in ("tritonbnn/kernels/a.py", "benchmarks/b.py", "tritonbnn/kernels/configs/c.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    before = [suite.fingerprint(tuned=tuned) for tuned in (True, False)]
    (tmp_path / "tritonbnn/kernels/configs/c.json").write_text("2")
    assert suite.fingerprint(tuned=True) != before[0]
    assert suite.fingerprint(tuned=False) == before[1]
    (tmp_path / "benchmarks/b.py").write_text("2")
    assert suite.fingerprint(tuned=False) != before[1]


@pytest.mark.bench
def test_a_failing_part_stops_no_other_and_is_named(tmp_path, capfd):
    todo = [
        Part("bad", timeit("raise ValueError")),
        Part("good", timeit("pass")),
        Part("foreign", timeit("pass"), program=("no-such-program",)),
    ]
    assert suite._run_all(suite.Suite(tmp_path, todo, 60), todo) == 1
    out, err = capfd.readouterr()
    assert err.strip() == f"bad: failed with exit code 1: see {tmp_path}/log/bad.log"
    assert "good: done" in out
    assert "foreign: left out: no-such-program is not installed" in out
    again = suite.Suite(tmp_path, todo, 60)
    assert [part.name for part in todo if again.is_done(part)] == ["good"]


@pytest.mark.bench
def test_a_part_out_of_time_is_stopped_with_its_children(tmp_path, capfd):
    note = tmp_path / "child"
    code = (
        "import os, pathlib, time; child = os.fork();"
        f"child and pathlib.Path({str(note)!r}).write_text(str(child)); time.sleep(60)"
    )
    part = Part("slow", timeit(code), turns=2)
    runner = suite.Suite(tmp_path, [part], 2)
    assert "run the same command again to go on" in runner.run(part)
    assert "turn 2 of at most 2" in capfd.readouterr().out
    assert not runner.is_done(part)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


@pytest.mark.bench
def test_a_limited_time_is_kept_and_used_by_what_fits(tmp_path, capfd):
    todo = [
        Part("long", timeit("pass"), minutes=8),
        Part("endless", timeit("import time; time.sleep(60)"), minutes=0.01, turns=3),
        Part("short", timeit("pass"), minutes=0.01),
        Part("report", timeit("pass"), minutes=8, always=True),
    ]
    start = time.monotonic()
    runner = suite.Suite(tmp_path, todo, 3, end=start + 30)
    assert suite._run_all(runner, todo) == 1
    assert time.monotonic() - start < 30
    out, err = capfd.readouterr()
    assert "long: left out for the next run: 0.5 minutes are left" in out
    assert "short: done" in out
    assert "report: done" in out
    assert err.startswith("endless: stopped after 0 minutes: run the same command again")
    again = suite.Suite(tmp_path, todo, 3)
    assert [part.name for part in todo if again.is_done(part)] == ["short"]


@pytest.mark.bench
def test_results_are_packed_into_one_file(tmp_path):
    folder, packed = tmp_path / "results", tmp_path / "all.tar.gz"
    flags = [*TINY, "--out", str(folder), "--only", "verdicts", "--pack", str(packed)]
    assert suite.main([*flags, "--minutes", "5"]) == 0
    with tarfile.open(packed) as file:
        names = set(file.getnames())
        verdicts = json.load(file.extractfile("results/verdicts.json"))["verdicts"]
    assert {"results/suite.json", "results/log/verdicts.log"} < names
    assert verdicts["popcount"]["exact"]


def test_the_costliest_questions_come_first(tmp_path):
    """Verdicts, then ours beside the expert compiled within five minutes, then other rivals."""
    found = parts.parts(tmp_path, tmp_path, cuda=True, tiny=False, fashion=None)
    first, ahead, second, third = found[:4]
    assert first.command[0] == "tritonbnn.kernels.trial"
    assert ahead.command[0] == "benchmarks.precompile"
    assert parts.FIRST in second.command
    assert set(ahead.command[1:]) <= set(second.command)  # the same step
    assert first.minutes + ahead.minutes + second.minutes <= 5
    assert third.name == "train-step-2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nonsense"], "unknown part 'nonsense': choose from verdicts"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--minutes", "0"], "must be a number of minutes above 0, as in 5m, not '0'"),
        (["--part-minutes", "nan"], "must be a number of minutes above 0, as in 5m, not 'nan'"),
        (["--out", "/dev/null/results", "--only", "layers-forward"], "cannot create|is a file"),
    ],
)
def test_a_user_error_is_one_line(arguments, message):
    with pytest.raises(cli.UserError, match=message) as caught:
        suite.main([*TINY, *arguments])
    assert "\n" not in str(caught.value)


def test_a_damaged_state_is_named(tmp_path):
    (tmp_path / "suite.json").write_text("{")
    with pytest.raises(cli.UserError, match=r"suite.json cannot be read .*: measure it again"):
        suite.main([*TINY, "--out", str(tmp_path), "--dry-run"])
