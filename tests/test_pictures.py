"""Pictures show the numbers that they are given: read back from the drawn figures."""

import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.numpy import load_file, save_file

from tests.records import LAYERS, write_lines, write_record
from tritonbnn.analysis.landscape import Landscape
from tritonbnn.report import lines, maps
from tritonbnn.report.confusion import Confused, Counts
from tritonbnn.report.read import read_runs
from tritonbnn.report.style import name_of, png, style


@contextmanager
def no_warnings():
    """Of what is drawn. An older matplotlib calls pyparsing by names of long ago."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", r"'\w+' (argument is )?deprecated", DeprecationWarning)
        yield


@pytest.fixture
def runs(tmp_path):
    """Two runs, of three and two epochs in step 1, of two and none in step 2."""
    write_record(tmp_path / "a", epochs=(3, 2))
    write_record(tmp_path / "b", epochs=(2, 0), seed=1)
    with style(), no_warnings():
        yield read_runs([tmp_path / "a", tmp_path / "b"])


def drawn(axis):
    """The lines of a panel, as (x, y)."""
    return [tuple(map(list, line.get_data())) for line in axis.get_lines()]


def test_curves(runs):
    axes = lines.curves(runs).axes
    loss, loss2, top1, top1_2, rate, rate2 = axes
    for axis, keys in ((loss, ("train_loss", "val_loss")), (top1, ("train_top1", "val_top1"))):
        firsts = [run.stages["step1"] for run in runs]
        expected = [(list(range(1, first.epochs + 1)), list(first.series(key)))
                    for first in firsts for key in keys]  # fmt: skip
        assert drawn(axis) == expected
    assert drawn(rate2) == [([1, 2], list(runs[0].stages["step2"].series("lr")))]
    assert len(drawn(loss2)) == len(drawn(top1_2)) == 2
    assert len(drawn(rate)) == 2
    assert loss.get_ylim() == loss2.get_ylim()


def test_an_epoch_alone_stands_in_the_middle_and_training_is_told_from_validation(tmp_path):
    write_record(tmp_path / "short", epochs=(1, 1))
    with style(), no_warnings():
        figure = lines.curves(read_runs([tmp_path / "short"]))
        assert png(figure)
    assert all(axis.get_xlim() == (0.5, 1.5) for axis in figure.axes)
    for axis in figure.axes[:4]:
        training, validation = axis.get_lines()
        assert training.get_markerfacecolor() == "white" != validation.get_markerfacecolor()
        assert training.get_markersize() > validation.get_markersize() > 0
    named = {t.get_text(): h for t, h in zip(*legend_of(figure), strict=True)}
    assert named["training"].get_markerfacecolor() == "white"
    assert named["training"].get_marker() == named["validation"].get_marker() == "o"


def legend_of(figure):
    """The words of a legend, and what stands beside them."""
    [legend] = figure.legends
    return legend.get_texts(), legend.legend_handles


def test_one_dead_weight_in_a_million_does_not_fill_the_axis(tmp_path):
    log = write_record(tmp_path / "run", epochs=(3, 0))
    for line in log:
        line["analysis"] |= {"dead": 1e-6, "revived": 0.3}
    write_lines(tmp_path / "run", log)
    with style():
        axes = lines.quantities(read_runs([tmp_path / "run"])).axes
    by_label = {axis.get_ylabel().partition(" ")[0]: axis.get_ylim() for axis in axes}
    assert by_label["dead"] == (0, 0.01)
    assert by_label["revived"][1] > 0.3


def test_where_no_weight_moved_the_axis_of_flips_is_not_logarithmic(tmp_path):
    log = write_record(tmp_path / "still", epochs=(1, 0))
    log[0]["analysis"]["flip_flop"] = 0.0
    write_lines(tmp_path / "still", log)
    with style(), no_warnings():
        panel = lines.quantities(read_runs([tmp_path / "still"])).axes[0]
        assert panel.get_yscale() == "linear"
    assert drawn(panel) == [([1], [0.0])]


def test_ratios_of_sampled_updates_are_marked_beside_those_of_all(tmp_path):
    """A log without the number of updates is of a time when some of them were counted."""
    old = write_record(tmp_path / "old", epochs=(3, 2))
    write_record(tmp_path / "new", epochs=(3, 2))
    for line in old:
        del line["analysis"]["updates"]
    write_lines(tmp_path / "old", old)
    with style(), no_warnings():
        both = read_runs([tmp_path / "old", tmp_path / "new"])
        figure, panels = lines.quantities(both), maps.layer_map(both, "flip_flop", "").axes
        other = maps.layer_map(both, "dead", "", bounds=(0, 1)).axes
        assert png(figure)
    for index, axis in enumerate(figure.axes):
        expected = [":", "-"] if index < 2 else ["-", "-"]
        assert [line.get_linestyle() for line in axis.get_lines()] == expected
    [legend] = figure.legends
    assert legend.get_texts()[-1].get_text() == "flip-flop ratio of sampled updates"
    titles = [axis.get_title() for axis in (*panels[:2], *other[:2])]
    assert titles == ["old\n(of sampled updates)", "new", "old", "new"]
    assert ["sampled updates" in " ".join(run.notes) for run in both] == [True, False]
    alone = lines.quantities(both[1:]).legends[0]
    assert [text.get_text() for text in alone.get_texts()] == ["new"]


def test_histograms_turned_on_later_have_no_start(tmp_path):
    write_record(tmp_path / "later", epochs=(3, 2))
    path = tmp_path / "later" / "step1" / "analysis.safetensors"
    tensors = load_file(path)
    for name in tensors:
        if name.startswith("histogram.b"):
            tensors[name][:2] = 0
    save_file(tensors, path)
    [run] = read_runs([tmp_path / "later"])
    axes = lines.histograms([run]).axes
    styles = [[patch.get_linestyle() for patch in axis.patches] for axis in axes]
    assert styles == [["-"]] * 4 + [["--", "-"]] * 4
    assert all(patch.get_data().values.any() for axis in axes for patch in axis.patches)
    assert run.notes == [
        "histograms of step1 of later were turned on in its middle: there is none of the"
        " stage's start"
    ]


@pytest.mark.parametrize(("key", "bounds"), [("saturation", (0, 1)), ("flip_flop", None)])
def test_layer_maps(runs, key, bounds):
    first, second, bar = maps.layer_map(runs, key, "label", bounds=bounds).axes
    expected = np.concatenate([step.by_layer(key) for step in runs[0].stages.values()], axis=1)
    np.testing.assert_array_equal(first.images[0].get_array(), expected)
    np.testing.assert_array_equal(
        second.images[0].get_array(), runs[1].stages["step1"].by_layer(key)
    )
    assert first.images[0].norm.vmax == second.images[0].norm.vmax
    assert first.get_xlim() == second.get_xlim() == (0.5, 5.5)
    assert [text.get_text() for text in first.get_yticklabels()] == ["0", "2", "10"]
    assert second.get_yticklabels() == []
    assert bar.get_ylabel() == "label"


def test_a_layer_map_names_what_only_one_run_has(tmp_path):
    write_record(tmp_path / "a", epochs=(1, 0))
    write_record(tmp_path / "b", epochs=(1, 0), layers=LAYERS[:1])
    figure = maps.layer_map(read_runs([tmp_path / "a", tmp_path / "b"]), "dead", "", bounds=(0, 1))
    assert [text.get_text() for text in figure.axes[1].get_yticklabels()] == ["0"]


def test_a_run_without_analysis_is_drawn_beside_one_with_it(tmp_path, runs):
    record = write_record(tmp_path / "c", full=False)
    for line in record:
        del line["analysis"]
    write_lines(tmp_path / "c", record)
    both = read_runs([tmp_path / "c", tmp_path / "a"])
    for figure in (
        maps.layer_map(both, "dead", "", bounds=(0, 1)),
        maps.channel_map(both),
        lines.quantities(both),
        lines.trajectories(both),
        lines.histograms(both),
    ):
        assert png(figure)
    [bare] = read_runs([tmp_path / "c"])
    for picture in (lines.quantities, lines.trajectories, lines.histograms, maps.channel_map):
        assert picture([bare]) is None
    assert maps.layer_map([bare], "dead", "", bounds=(0, 1)) is None


def test_an_epoch_without_a_value_is_a_hole(tmp_path):
    record = write_record(tmp_path / "a", epochs=(3, 0))
    del record[1]["analysis"]["layers"][LAYERS[2]]["dead"]
    write_lines(tmp_path / "a", record)
    shown = maps.layer_map(read_runs([tmp_path / "a"]), "dead", "", bounds=(0, 1)).axes[0]
    hole = np.zeros((3, 3), bool)
    hole[2, 1] = True
    np.testing.assert_array_equal(np.ma.getmaskarray(shown.images[0].get_array()), hole)


def test_channels_are_sorted_and_of_the_last_epoch(runs):
    axis = maps.channel_map(runs).axes[0]
    shown = axis.images[0].get_array()
    for row, (name, values) in zip(
        shown, runs[0].stages["step2"].of_layers("saturation").items(), strict=True
    ):
        assert name in LAYERS
        np.testing.assert_array_equal(np.unique(row), np.unique(values[-1]))
        assert (np.diff(row) >= 0).all()


def test_histograms_are_densities(runs):
    figure = lines.histograms(runs)
    (total, *_), (first, *_) = figure.axes[:1], figure.axes[1:2]
    tensors = runs[0].stages["step1"].tensors
    start, end = (patch.get_data() for patch in total.patches[:2])
    summed = sum(tensors[f"histogram.{name}"] for name in LAYERS)
    for shown, counts in ((start, summed[0]), (end, summed[-1])):
        expected, _ = np.histogram(
            np.linspace(-0.95, 0.95, 20), bins=shown.edges, weights=counts, density=True
        )
        np.testing.assert_allclose(shown.values, expected, rtol=1e-5)
    counts = tensors[f"histogram.{LAYERS[0]}"][0]
    np.testing.assert_allclose(
        first.patches[0].get_data().values * np.diff(start.edges), counts / counts.sum(), rtol=1e-6
    )


def test_histograms_reach_as_far_as_any_run(runs):
    for run, bins in zip(runs, (slice(4, 16), slice(9, 11)), strict=True):
        for name in LAYERS:
            counts = run.stages["step1"].tensors[f"histogram.{name}"]
            counts[:] = 0
            counts[:, bins] = 7
    assert lines.histograms(runs).axes[0].get_xlim() == pytest.approx((-0.6, 0.6))


def test_histograms_of_nothing_are_empty(runs):
    for name in LAYERS:
        runs[0].stages["step1"].tensors[f"histogram.{name}"][:] = 0
    assert png(lines.histograms(runs[:1]))


def test_trajectories_keep_steps_apart(runs):
    gradient = lines.trajectories(runs).axes[0]
    shown = [line for line in drawn(gradient) if len(line[0]) > 0 and line[0][0] != line[0][-1]]
    expected = [([1, 2, 3], list(row)) for row in runs[0].stages["step1"].by_layer("gradient")]
    expected += [([4, 5], list(row)) for row in runs[0].stages["step2"].by_layer("gradient")]
    assert shown == expected


def test_landscapes(runs):
    axis = np.linspace(-1, 1, 3)
    loss = np.array([[1.0, 2.0, 3.0], [4.0, 0.1, np.nan], [7.0, 8.0, 9.0]])
    figure = maps.landscapes(runs, [{"step1": Landscape(axis, loss, 4)}, {}])
    shown = figure.axes[0].images[0]
    np.testing.assert_array_equal(shown.get_array().filled(np.nan), loss)
    assert shown.origin == "lower"
    assert shown.get_extent() == [-1.5, 1.5, -1.5, 1.5]
    assert [text.get_text() for text in figure.axes[1].texts] == ["not measured"]
    assert maps.landscapes(runs, [{}, {}]) is None


def test_landscapes_that_are_flat_or_nan_are_drawn_without_a_warning(runs):
    axis = np.linspace(-1, 1, 3)
    nan, flat, steep = (
        Landscape(axis, loss, 4)
        for loss in (
            np.full((3, 3), np.nan),
            np.ones((3, 3)),
            np.geomspace(0.1, 9, 9).reshape(3, 3),
        )
    )
    assert maps.landscapes(runs, [{"step1": nan}, {}]) is None
    both = [{"step1": nan, "step2": steep}, {"step1": flat}]
    for grids in (both, [{"step1": flat}, {}]):
        assert png(maps.landscapes(runs, grids))


def test_confusions(runs):
    counts = Counts(2, torch.tensor([0, 1]), torch.tensor([3, 1]))
    figure = maps.confusions(runs, [None, Confused(1, ["yes", "no"], counts)])
    shown = figure.axes[0]
    np.testing.assert_array_equal(shown.images[0].get_array(), [[75, 25], [0, 0]])
    assert {(t.get_text(), t.get_position()) for t in shown.texts} == {("3", (0, 0)), ("1", (1, 0))}
    many = Confused(1, [str(index) for index in range(21)], counts)
    assert maps.confusions(runs, [None, many]) is None


def test_names_are_no_formulas():
    assert name_of("a$b$") == r"a\$b\$"
    assert name_of("_a") == " _a"
    assert name_of("x" * 99) == "x" * 31 + "…"
    assert name_of("\u6570\n") == "��"
    with style():
        figure = Figure()
        figure.text(0, 0, name_of("$\\frac{$ $x$"))
        assert png(figure) == png(figure)
