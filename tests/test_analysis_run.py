"""The analysis in a run: in its log, on TensorBoard, in its file, and never in its weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.commands import TRAIN, Result, run, run_two, write_tiny
from tritonbnn.nn import binary_weights
from tritonbnn.train.checkpoint import read
from tritonbnn.train.log import scalars
from tritonbnn.train.weights import load_network

TOTALS = ["c2i_full", "c2i_half", "flip_flop", "dead", "saturation"]
OF_LAYER = [*TOTALS, "saturated_channels", "gradient", "adam_step", "weight"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analysis")
    write_tiny(folder)
    return folder


def train(place: Path, out: str, *argv: object, code: int = 0, **mishap) -> Result:
    result = run(TRAIN, "tiny.toml", "--out", out, *argv, cwd=place, **mishap)
    assert result.code == code, result.output
    return result


def records(folder: Path) -> list[dict]:
    return [json.loads(line).get("analysis") for line in (folder / "log.jsonl").open()]


@pytest.fixture(scope="module")
def full(place: Path) -> Path:
    """A run that looks at every second optimiser step, of 2 an epoch, and keeps histograms.

    The probe batch is larger than the validation set, of 6 images.
    """
    train(place, "full", "--analysis", "full", "--analysis-interval", 2)
    return place / "full"


def test_every_line_has_a_record(full: Path):
    of_step = {1: records(full)[:2], 2: records(full)[2:]}
    for step, (first, second) in of_step.items():
        names = list(binary_weights(load_network(full / f"step{step}")[0]))
        for record, more in ((first, []), (second, ["revived"])):
            assert sorted(record) == sorted([*TOTALS, *more, "layers", "updates"])
            assert list(record["layers"]) == names
            for layer in record["layers"].values():
                assert sorted(layer) == sorted([*OF_LAYER, *more])
        assert 0 < first["flip_flop"] < 0.5
        assert second["flip_flop"] == 0  # at learning rate 0
        assert first["layers"][names[0]]["adam_step"] > 0


def test_c2i_is_against_what_step_1_handed_over(full: Path):
    start, end = (load_network(full / p)[0] for p in ("step1", "step2/last.safetensors"))
    pairs = list(zip(binary_weights(start).values(), binary_weights(end).values(), strict=True))
    same = sum(int(((a >= 0) == (b >= 0)).sum()) for a, b in pairs)
    total = sum(a.numel() for a, _ in pairs)
    assert same < total
    assert records(full)[-1]["c2i_full"] == pytest.approx(same / total, abs=1e-15)


def test_full_writes_a_file_of_rows(full: Path):
    for step in (1, 2):
        rows = load_file(full / f"step{step}" / "analysis.safetensors")
        model, _ = load_network(full / f"step{step}" / "last.safetensors")
        weights = binary_weights(model)
        assert rows.pop("histogram.edges").shape == (301,)
        assert len(rows) == 2 * len(weights)
        for name, weight in weights.items():
            counts, shares = rows[f"histogram.{name}"], rows[f"saturation.{name}"]
            assert counts.sum(1).tolist() == [weight.numel()] * 3
            assert shares.shape == (3, weight.shape[1])
            negative = int((weight < 0).sum())
            assert int(counts[-1, :150].sum()) == negative
            last = records(full)[2 * step - 1]["layers"][name]
            assert shares[-1].mean().item() == pytest.approx(last["saturation"], rel=1e-5)
    end, start = (
        load_file(full / f"step{step}" / "analysis.safetensors")[f"histogram.{name}"]
        for step in (1, 2)
    )
    best = read(full / "step1" / "best.safetensors").facts["best"]["epoch"]
    assert torch.equal(start[0], end[best])


def test_looking_changes_nothing(place: Path, full: Path):
    train(place, "off", "--analysis", "off")
    assert records(place / "off") == [None] * 4
    assert not list((place / "off").rglob("analysis.safetensors"))
    for step in (1, 2):
        ours, theirs = (read(f / f"step{step}/last.safetensors") for f in (place / "off", full))
        assert all(torch.equal(t, theirs.tensors[n]) for n, t in ours.tensors.items())
        assert ours.tensors.keys() < theirs.tensors.keys()


def test_looking_changes_nothing_where_gradients_are_scaled(place: Path):
    for level in ("off", "light"):
        flags = ("--precision", "fp16", "--analysis-interval", 1, "--step", 1)
        train(place, f"fp16-{level}", "--analysis", level, *flags)
    off, light = (read(place / f"fp16-{n}/step1/last.safetensors") for n in ("off", "light"))
    assert all(torch.equal(t, light.tensors[n]) for n, t in off.tensors.items())
    gradients = [r["layers"]["blocks.0.weight"]["gradient"] for r in records(place / "fp16-light")]
    assert all(0 < value < 100 for value in gradients)  # the scale is 2^16


def test_it_may_be_turned_on_later(place: Path, full: Path):
    """Signs were followed all the time; the window of the broken epoch has begun anew."""
    train(place, "later", "--analysis", "off", code=75, mishap="SIGTERM", at_step=3)
    train(place, "later", "--analysis", "full", "--analysis-interval", 1)
    first, second, *step_2 = records(place / "later")
    assert first is None
    expected = records(full)
    for key in ("c2i_full", "saturation"):
        assert second[key] == expected[1][key]
        assert [r[key] for r in step_2] == [r[key] for r in expected[2:]]
    assert "revived" not in second
    rows = load_file(place / "later" / "step1" / "analysis.safetensors")
    theirs = load_file(full / "step1" / "analysis.safetensors")
    name = next(n for n in rows if n.startswith("histogram.b"))
    assert rows[name].sum(1).tolist()[:2] == [0, 0]
    assert torch.equal(rows[name][2], theirs[name][2])


def test_tensorboard_draws_it(full: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(full / "tensorboard" / "step1"))
    board.Reload()
    line = json.loads((full / "log.jsonl").open().readline())
    tags = scalars(line)
    layer = next(iter(line["analysis"]["layers"]))
    assert tags[f"analysis/gradient/{layer}"] == line["analysis"]["layers"][layer]["gradient"]
    assert {"analysis/flip_flop", "train_loss"} < set(tags)
    for tag, value in tags.items():
        event = board.Scalars(tag)[0]
        assert (event.step, event.value) == (1, pytest.approx(value, rel=1e-6)), tag


def test_a_run_of_one_epoch(place: Path):
    train(place, "one", "--epochs", 1)
    for record in records(place / "one"):
        assert record["flip_flop"] == 0
        assert record["c2i_full"] == record["c2i_half"] == 1


def test_two_processes_measure_the_same_once(place: Path):
    argv = ("tiny.toml", "--out", "two", "--analysis", "full", "--epochs", 2)
    first, second = run_two(TRAIN, *argv, cwd=place)
    assert (first.code, second.code) == (0, 0), first.output
    assert second.calls == 0
    for record in records(place / "two"):
        assert {*TOTALS, "layers"} <= record.keys()
        assert 0 < record["c2i_full"] <= 1
    rows = load_file(place / "two" / "step2" / "analysis.safetensors")
    assert all(len(t) == 3 for n, t in rows.items() if n != "histogram.edges")


def test_an_older_checkpoint_is_a_clear_error(place: Path):
    from tritonbnn.train.checkpoint import encode

    train(place, "old", code=75, mishap="SIGTERM", at_step=1)
    for path in (place / "old" / "step1").glob("*.safetensors"):
        old = read(path)
        tensors = {n: t for n, t in old.tensors.items() if not n.startswith("analysis.")}
        facts = {k: v for k, v in old.facts.items() if k not in ("format", "checksum")}
        path.write_bytes(encode(tensors, facts))
    result = train(place, "old", code=2)
    assert "holds no state to go on from ('start' is missing): start over with" in result.output
