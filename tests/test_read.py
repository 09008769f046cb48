"""Reading saved runs: what is there is found, and what is not is said in one line."""

import math

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.records import LAYERS, write_lines, write_record
from tritonbnn.cli import UserError
from tritonbnn.report.read import read_runs


def only(folder):
    [run] = read_runs([folder])
    return run


def test_values_come_by_epoch_and_layer(tmp_path):
    lines = write_record(tmp_path / "run", epochs=(3, 2))
    run = only(tmp_path / "run")
    assert run.notes == []
    assert list(run.stages) == ["step1", "step2"]
    for name, step in run.stages.items():
        own = [line for line in lines if line["stage"] == name]
        assert step.epochs == len(own)
        assert step.layers == list(LAYERS)
        np.testing.assert_array_equal(step.series("val_loss"), [x["val_loss"] for x in own])
        analysis = [line["analysis"] for line in own]
        np.testing.assert_array_equal(step.series("dead"), [x["dead"] for x in analysis])
        expected = [[x["layers"][name]["weight"] for x in analysis] for name in LAYERS]
        np.testing.assert_array_equal(step.by_layer("weight"), expected)
        assert np.isnan(step.by_layer("unknown")).all()
        assert step.by_layer("unknown").shape == (3, len(own))


def test_layers_of_a_file_keep_their_order(tmp_path):
    write_record(tmp_path / "run")
    layers = only(tmp_path / "run").stages["step1"].of_layers("saturation")
    assert list(layers) == list(LAYERS)
    assert {len(rows) for rows in layers.values()} == {4}


def test_a_log_without_analysis_is_read(tmp_path):
    lines = write_record(tmp_path / "run", full=False)
    for line in lines:
        del line["analysis"]
    write_lines(tmp_path / "run", lines)
    step = only(tmp_path / "run").stages["step2"]
    assert step.layers == []
    assert step.by_layer("dead").shape == (0, 2)
    assert np.isnan(step.series("dead")).all()
    assert step.series("lr").tolist() == [line["lr"] for line in lines if line["stage"] == "step2"]


def test_a_cut_off_last_line_is_left_out(tmp_path):
    lines = write_record(tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(log.read_bytes()[:-30])
    run = only(tmp_path / "run")
    assert run.notes == [f"{log} ends in the middle of line 5: used up to there"]
    assert run.stages["step2"].epochs == 1
    assert run.stages["step1"].epochs == len([line for line in lines if line["stage"] == "step1"])


@pytest.mark.parametrize(
    "garbage",
    [b"\xff\x00", b"[]", b"{}", b'{"step": 3, "epoch": 1}', b'{"step": 1, "epoch": "1"}',
     b'{"step": 1, "epoch": 0}', b'{"step": [], "epoch": 1}', b'{"step": 1, "epoch": 1e9}',
     b'{"step": 1, "epoch": true}'],
)  # fmt: skip
def test_garbage_within_a_log_is_left_out(tmp_path, garbage):
    write_record(tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    rows = log.read_bytes().splitlines()
    rows[1] = garbage
    log.write_bytes(b"\n".join(rows) + b"\n")
    run = only(tmp_path / "run")
    assert run.notes == [f"{log}: line 2 is not an epoch's: left out"]
    seen = run.stages["step1"].series("lr")
    assert np.isnan(seen).tolist() == [False, True, False]


def test_numbers_that_are_none_are_left_out_and_named(tmp_path):
    lines = write_record(tmp_path / "run", epochs=(5, 0))
    for line in lines:
        line["train_loss"] = math.nan
    lines[2]["analysis"]["layers"][LAYERS[0]]["weight"] = math.inf
    lines[3]["analysis"]["layers"][LAYERS[1]] = {
        "weight": "heavy",
        "dead": 10**400,
        "revived": True,
    }
    lines[4]["analysis"] = []
    write_lines(tmp_path / "run", lines)
    run = only(tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    assert run.notes == [
        f"{log}: train_loss is not a finite number in step1 epoch 1, step1 epoch 2,"
        " step1 epoch 3 and 2 more: left out",
        f"{log}: a layer's weight is not a finite number in step1 epoch 3: left out",
    ]
    step = run.stages["step1"]
    assert np.isnan(step.series("train_loss")).all()
    weights = step.by_layer("weight")
    assert np.isnan(weights[0, 2])
    assert np.isnan(weights[1, 3])
    assert np.isnan(weights[:, 4]).all()
    for key in ("dead", "revived"):
        assert np.isnan(step.by_layer(key)[1, 3])
    assert np.isfinite(weights[2, :4]).all()


def test_damaged_tensors_are_named(tmp_path):
    write_record(tmp_path / "run")
    path = tmp_path / "run" / "step2" / "analysis.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    run = only(tmp_path / "run")
    assert run.stages["step2"].tensors == {}
    assert run.stages["step1"].tensors
    [note] = run.notes
    assert note.startswith(f"{path} is damaged, so histograms and channels are not shown: ")


def test_tensors_of_other_shapes_are_named(tmp_path):
    write_record(tmp_path / "run", epochs=(2, 0))
    path = tmp_path / "run" / "step1" / "analysis.safetensors"
    tensors = load_file(path)
    tensors[f"histogram.{LAYERS[0]}"] = tensors[f"histogram.{LAYERS[0]}"][:, 1:]
    tensors[f"saturation.{LAYERS[1]}"] = tensors[f"saturation.{LAYERS[1]}"][0]
    save_file(tensors, path)
    run = only(tmp_path / "run")
    [note] = run.notes
    assert note.startswith(f"{path} has tensors of other shapes than it should: ")
    assert set(note.split(": ")[1].split(", ")) == {
        f"histogram.{LAYERS[0]}",
        f"saturation.{LAYERS[1]}",
    }
    assert list(run.stages["step1"].of_layers("histogram")) == list(LAYERS[1:])
    assert list(run.stages["step1"].of_layers("saturation")) == [LAYERS[0], LAYERS[2]]


def test_a_run_without_settings_is_read(tmp_path):
    write_record(tmp_path / "run")
    (tmp_path / "run" / "config.toml").write_text("= broken")
    run = only(tmp_path / "run")
    assert run.config == {}
    assert "config.toml cannot be read, so its settings are not shown" in run.notes[0]


def test_labels_tell_runs_apart(tmp_path):
    folders = [tmp_path / "a" / "run", tmp_path / "b" / "run", tmp_path / "c"]
    for folder in folders:
        write_record(folder)
    labels = [run.label for run in read_runs(folders)]
    assert labels == ["a/run", "b/run", f"{tmp_path.name}/c"]


def test_the_same_run_twice_is_refused(tmp_path):
    write_record(tmp_path / "run")
    with pytest.raises(UserError, match="is given twice: name each run once"):
        read_runs([tmp_path / "run", tmp_path / "." / "run"])


def test_a_run_that_shows_nothing_is_named_beside_one_that_does(tmp_path):
    write_record(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    [run] = read_runs([tmp_path / "empty", tmp_path / "run"])
    assert run.notes == [
        f"{tmp_path / 'empty'} holds no log.jsonl: name the folder of a run that has begun"
    ]


@pytest.mark.parametrize("log", [b"", b"\n\n", b"{", b"nothing\nof\nuse\n"])
def test_a_log_of_nothing_is_refused(tmp_path, log):
    (tmp_path / "log.jsonl").write_bytes(log)
    with pytest.raises(UserError, match=r"log\.jsonl tells of no epoch yet"):
        read_runs([tmp_path])


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist: name a run's folder"):
        read_runs([tmp_path / "nowhere"])
