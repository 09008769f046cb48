"""What is timed against what, how, and the whole command at a tiny size."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import parallel_num_threads
from torch.autograd import DeviceType
from torch.nn import functional as F
from torchvision.models import resnet34

from benchmarks import capacity, loop, passes, profiled, rivals, rounds, steps, train_step
from benchmarks.families import ELEMENTWISE, FAMILIES, FORWARD, GRADIENTS, PACK
from benchmarks.families import PASSES as PASS_FAMILIES
from benchmarks.point import Point
from benchmarks.runner import RivalError, Runner
from benchmarks.twin import FloatReActNetA, FloatUnit
from tests.commands import write_tree
from tests.helpers import gradient
from tests.tape import Tape
from tritonbnn import cli
from tritonbnn.compute import Compute
from tritonbnn.data.batches import MicroBatch
from tritonbnn.kernels.problems.network import model_layers
from tritonbnn.native import clock, library
from tritonbnn.train.arguments import parse
from tritonbnn.train.captured import WARM_UP
from tritonbnn.train.job import open_images

CPU = torch.device("cpu")
TINY = ["--size", "32", "--width", "0.25", "--rounds", "2", "--device", "cpu"]


def test_a_rival_is_a_network_and_how_it_is_run():
    rival = rivals.parse("obvious+bf16+channels_last+max-autotune")
    assert (rival.network, rival.bf16, rival.mode) == (
        "obvious",
        True,
        "max-autotune-no-cudagraphs",
    )
    assert rival.memory_format == torch.channels_last
    plain = rivals.parse("obvious")
    assert (plain.graph, rivals.parse("expert+graph+compile").graph) == (False, True)
    assert (plain.bf16, plain.mode, plain.memory_format) == (False, None, torch.contiguous_format)
    assert rivals.parse("ours").memory_format == torch.channels_last
    step1 = rivals.parse("ours-unfused").build("reactnet_18", 1, width=0.25, num_classes=10)
    assert {unit.fused for unit in step1.modules() if hasattr(unit, "fused")} == {False}


def test_a_repeated_step_trains_as_an_ordinary_one():
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)

    def network():
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4))
        return nn.Sequential(*layers)

    ordinary = steps.training_step(network(), images, labels)
    repeated = steps.training_step(network(), images, labels, graphs=Tape())
    expected = [ordinary() for _ in range(WARM_UP + 3)][WARM_UP:]
    assert torch.equal(torch.stack(expected), torch.stack([repeated() for _ in range(3)]))


def test_other_models_have_rivals_of_our_own_only():
    assert {"ours", "ours-recompute"} <= set(rivals.chosen(None, CPU, "reactnet_18"))
    assert set(rivals.chosen(None, CPU, "reactnet_18")) <= set(rivals.OWN)
    assert set(rivals.chosen(None, CPU, "reactnet_a")) == set(rivals.DEFAULTS["cpu"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rivals", "theirs"], "unknown rival 'theirs': 'theirs' is none of ours"),
        (["--rivals", "ours+fp8"], "unknown rival 'ours.fp8': 'fp8' is none of bf16"),
        (["--rivals", "obvious+compile+max-autotune"], "compiles twice"),
        (["--rivals", "ours,ours"], "names one twice"),
        (["--rivals", "ours+graph"], "ours.graph is a CUDA graph, and this is a CPU: leave .graph"),
        (["--model", "reactnet_18", "--rivals", "twin"], "there is no twin of reactnet_18"),
        (["--batches", "2,0"], "must be a whole number of at least 1, not .0."),
        (["--width", "0"], "--width must be above 0"),
        (["--width", "inf"], "--width must be above 0 and finite, not inf"),
        (["--width", "nan"], "--width must be above 0 and finite, not nan"),
        (["--batches", "8,1", "--sizes", "64,32"], "one image of 32 x 32 ends as one value"),
        (["--teacher", "resnet34"], "--teacher needs images"),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "nowhere", "--batches", "2,4"], "the loop takes one --batch"),
        (["--data", "nowhere", "--graph"], "--graph captures what a GPU does, and this is a CPU"),
        (["--recipe", "didgits"], "didgits"),
        (["--recipe", "digits", "--floor"], "--floor counts no network for small images"),
        (["--json", "/dev/null/x.json"], "/dev/null"),
    ],
)
def test_a_user_error_is_one_line(arguments, message):
    with pytest.raises(cli.UserError, match=message) as caught:
        train_step.main([*TINY, *arguments])
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(cli.UserError, match="torch finds no CUDA device"):
        train_step.main(["--device", "cuda"])


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Of the command, on three rivals."""
    path = tmp_path_factory.mktemp("train_step") / "new" / "result.json"
    words = "ours+bf16,obvious+channels_last,twin"
    flags = ["--batch", "2", "--rivals", words, "--floor", "--json", str(path)]
    assert train_step.main([*TINY, *flags]) == 0
    return json.loads(path.read_text())


@pytest.mark.bench
def test_a_sweep_is_a_row_of_points(tmp_path):
    path = tmp_path / "sweep.json"
    sweep = ["--batches", "2,3", "--sizes", "64", "--no-details", "--rivals", "twin"]
    assert train_step.main([*TINY, *sweep, "--json", str(path)]) == 0
    points = json.loads(path.read_text())["points"]
    assert [(p["batch"], p["size"]) for p in points] == [(2, 64), (3, 64)]
    for point in points:
        timed = {"seconds", "median_seconds", "spread", "images_per_second"}
        assert set(point["rows"]["twin"]) == {*timed, "cpu_seconds", "page_faults"}


@pytest.fixture
def threads():
    """As many as now, afterwards."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.bench
def test_a_recipe_gives_network_batch_and_images(tmp_path, threads):
    path = tmp_path / "digits.json"
    flags = ["--recipe", "digits", "--batch", "4", "--rivals", "expert,twin", "--no-details"]
    more = ["--threads", "3", "--rounds", "1", "--device", "cpu", "--json", str(path)]
    assert train_step.main([*flags, *more]) == 0
    result = json.loads(path.read_text())
    config = parse(["digits"]).config
    source = open_images(config)
    assert (result["in_channels"], result["classes"]) == (source.channels, len(source.classes))
    assert (result["width"], result["small_images"]) == (config.width, config.small_images)
    assert result["threads"] == 3
    assert [(p["batch"], p["size"]) for p in result["points"]] == [(4, config.image_size)]
    args = train_step.parser().parse_args(["--recipe", "digits"])
    train_step.fill_shape(args)
    assert args.batch == [config.batch_size]


@pytest.mark.parametrize("name", ["ours", "expert", "twin"])
def test_every_rival_takes_the_digits(name):
    point = Point("reactnet_a", 2, 4, 32, 0.25, CPU, 1, True, 10)
    rival = rivals.parse(name)
    network = point.build(rival)
    assert network(point.images(rival, 4)).shape == (4, 10)
    stem = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    assert (stem.in_channels, stem.out_channels, stem.stride) == (1, 8, (1, 1))


@pytest.mark.compile
def test_what_a_compiled_network_saves_is_counted_without_making_code():
    point = Point("reactnet_a", 2, 4, 32, 0.25, CPU, 1, True, 10)
    saved = {
        name: Runner(point, rivals.parse(name))._saved()["saved_mb_per_image"]
        for name in ("ours", "expert+compile", "expert", "obvious")
    }
    assert list(saved.values()) == sorted(saved.values())
    assert saved["expert+compile"] < 0.9 * saved["expert"]


@pytest.mark.bench
def test_a_row_says_what_was_measured(result):
    assert result["command"].endswith("--rivals ours+bf16,obvious+channels_last,twin --floor")
    assert result["own_processes"]
    for point in result["points"]:
        assert set(point["rows"]) == {"ours+bf16", "obvious+channels_last", "twin"}
        for row in point["rows"].values():
            middle = sum(row["seconds"]) / 2  # of two rounds
            assert row["median_seconds"] == pytest.approx(middle, abs=2e-6)
            assert row["spread"] == pytest.approx(
                (max(row["seconds"]) - min(row["seconds"])) / middle, abs=1e-3
            )
            assert 0 < row["cpu_seconds"] < 10 * middle
            assert row["images_per_second"] == pytest.approx(point["batch"] / middle, rel=1e-2)
            assert set(row["time_ms"]) <= set(FAMILIES)
            assert set(row["moved_mb"]) == set(row["time_ms"])


@pytest.mark.bench
def test_shares_are_of_the_floor_in_the_same_dtype(result):
    for point in result["points"]:
        for name, dtype in (("ours+bf16", "bf16"), ("twin", "fp32")):
            row = point["rows"][name]
            fastest = max(
                floor["images_per_second"]
                for plan, floor in point["floors"].items()
                if dtype in plan
            )
            assert row["share_of_floor"] == pytest.approx(
                row["images_per_second"] / fastest, rel=1e-2
            )


@pytest.mark.bench
def test_our_step_is_shown_by_pass(result):
    if not library.available():
        pytest.skip(library.reason())
    rows = result["points"][0]["rows"]
    assert [name for name, row in rows.items() if "passes" in row] == ["ours+bf16"]
    row = rows["ours+bf16"]
    *names, rest = row["passes"]
    assert rest == passes.REST
    assert set(names) == set(clock.PASSES) - {"moments"}  # they come with the product
    assert all(row["passes"][name]["bound_ms"] > 0 for name in names)
    assert all(pass_["thread_ms"] >= 0 for pass_ in row["passes"].values())
    lines = passes.describe(row)
    assert [line.split("  ")[0] for line in lines[:-1]] == list(row["passes"])
    assert all(value > 0 for value in row["roofs"].values())
    assert passes.describe(rows["twin"]) == []


def test_passes_and_the_rest_are_the_step():
    point = Point("reactnet_a", 2, 4, 32, 0.25, CPU, 1, True, 10)
    runner = Runner(point, rivals.parse("ours"))
    runner.trial()
    if not library.available():
        assert passes.time_by_pass(runner._step) == {}
        return
    took, taken = passes._clocked(runner._step)
    assert 0 < sum(pass_.nanoseconds for pass_ in taken.values()) < took
    times = profiled.time_by_family(runner._step, CPU)
    assert min(times[family] for family in (PACK, FORWARD, GRADIENTS, ELEMENTWISE)) > 0
    assert set(PASS_FAMILIES) < set(clock.PASSES)


def test_the_bound_of_a_pass_is_its_bytes_or_its_products():
    roofs = passes.Roofs(copy_gbs=10, table_gops=100, bit_gops=1000)
    work = {"bytes": 40, "table_products": 0, "bit_products": 0}
    for products, bound in (({}, 4), ({"table_products": 700}, 7), ({"bit_products": 5000}, 5)):
        taken = clock.Taken(calls=2, nanoseconds=9, **(work | products))
        assert roofs.nanoseconds(taken) == bound


@pytest.mark.bench
def test_only_binary_networks_pack(result):
    rows = result["points"][0]["rows"]
    assert [name for name, row in rows.items() if "pack" in row["time_ms"]] == ["ours+bf16"]
    ours, obvious = rows["ours+bf16"], rows["obvious+channels_last"]
    assert ours["saved_mb_per_image"] < obvious["saved_mb_per_image"] / 4
    assert sum(ours["moved_mb"].values()) < sum(obvious["moved_mb"].values()) / 2


def test_the_twin_convolves_what_reactnet_a_convolves():
    found = []

    def note(conv, inputs, output):
        _, channels, height, _ = inputs[0].shape
        found.append((height, channels, conv.out_channels, *conv.kernel_size[:1], *conv.stride[:1]))

    with torch.device("meta"):
        network = FloatReActNetA(num_classes=10, width=0.5)
        for module in network.blocks.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        assert network(torch.empty(2, 3, 64, 64)).shape == (2, 10)
    layers = model_layers("reactnet_a", 2, 64, 0.5)
    expected = [
        (layer.height, layer.channels, layer.out_channels, layer.kernel_size, layer.stride)
        for layer in layers.elements()
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(("out", "stride"), [(8, 1), (16, 1), (8, 2)])
def test_a_float_unit_is_its_formula(out, stride):
    unit = FloatUnit(8, out, 3, stride).eval()
    for parameter in unit.parameters():
        parameter.data = gradient(*parameter.shape, seed=parameter.numel())
    x = gradient(2, 8, 6, 6)
    conv, norm = unit.conv
    first, prelu, last = unit.rprelu
    y = F.conv2d(x, conv.weight, stride=stride, padding=1) / (1 + norm.eps) ** 0.5
    y = y * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
    y += (
        x.unflatten(2, (-1, stride)).unflatten(4, (-1, stride)).mean((3, 5)).tile(1, out // 8, 1, 1)
    )
    y += first.bias
    expected = torch.where(y > 0, y, y * prelu.weight.view(-1, 1, 1)) + last.bias
    torch.testing.assert_close(unit(x), expected)


class Constant(nn.Module):
    """A network whose loss is the same whatever it learns."""

    def __init__(self, value):
        super().__init__()
        self.logits = nn.Parameter(torch.full((steps.CLASSES,), value))

    def forward(self, images):
        return (self.logits + 0 * images.flatten(1)[:, :1]) * 0


@pytest.mark.parametrize(
    ("value", "reason"), [(1.0, "the loss does not fall"), (torch.inf, "the loss is not finite")]
)
def test_what_does_not_train_is_not_timed(value, reason):
    images, labels = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
    assert reason in steps.does_not_train(steps.training_step(Constant(value), images, labels))


def test_a_step_changes_the_weights_by_the_gradient_of_this_batch_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, steps.CLASSES))
    images, labels = torch.randn(4, 3, 2, 2), torch.tensor([1, 2, 3, 4])
    step = steps.training_step(model, images, labels)
    assert step() > step() > step()
    with torch.no_grad():
        before = F.cross_entropy(model(images), labels)
    assert step() == pytest.approx(before.item(), rel=1e-6)


def test_compiled_code_of_other_threads_is_not_taken_from_the_disk(threads):
    """The compiler's settings are its key on disk, so they must tell the threads."""
    keys = []
    for count in (1, 2):
        torch.set_num_threads(count)
        with steps.as_trainers_run():
            assert parallel_num_threads() == count
            keys.append(inductor_config.save_config_portable(ignore_private_configs=False))
    assert keys[0] != keys[1]


def test_out_of_memory_is_met_with_half_the_batch():
    def attempt(batch):
        return torch.empty(2**50 if batch > 3 else batch)  # a petabyte

    assert not capacity.fits(lambda: attempt(4))
    assert capacity.largest_fitting(attempt, 17) == 2
    assert capacity.largest_fitting(lambda batch: torch.empty(2**50), 17) == 0
    with pytest.raises(RuntimeError, match="another"):
        capacity.fits(lambda: nn.Module().load_state_dict({"another": torch.zeros(1)}))


def test_the_spread_is_that_of_the_rounds():
    expected = {"seconds": [1.0, 4.0, 2.0], "median_seconds": 2.0, "spread": 1.5}
    assert rounds.summary([1.0, 4.0, 2.0]) == expected


def event(name, *, device=DeviceType.CPU, us=0, kernels=(), parent=None, annotation=False):
    """What the profiler reports of an operator, or of a kernel."""
    return SimpleNamespace(
        name=name,
        device_type=device,
        time_range=SimpleNamespace(elapsed_us=lambda: us),
        kernels=[SimpleNamespace(name=kernel, duration=us) for kernel in kernels],
        cpu_parent=parent,
        input_shapes=[],
        is_user_annotation=annotation,
    )


def test_kernels_count_once_under_what_launched_them():
    outer = event("tritonbnn::conv_packed")
    step = event("Optimizer.step#Adam.step", us=50, kernels=["Optimizer.step#Adam.step"])
    events = [
        outer,
        step,
        event("aten::add", us=3, kernels=["vectorized_elementwise"], parent=outer),
        event("vectorized_elementwise", device=DeviceType.CUDA, us=3),
        event("vectorized_elementwise", device=DeviceType.CUDA, us=4),  # nobody's
        event("Optimizer.step#Adam.step", device=DeviceType.CUDA, us=50, annotation=True),
        event("sm90_xmma_wgrad_implicit_gemm", device=DeviceType.CUDA, us=7),
    ]
    times = {family: us for family, us in profiled._kernel_times(events).items() if us}
    assert times == {FORWARD: 3, ELEMENTWISE: 4, GRADIENTS: 7}


def test_the_loop_repeats_its_step_from_graphs():
    images, labels = torch.randn(4, 3, 8, 8), torch.arange(4)
    batch = MicroBatch(images, labels, 4, 4, True)
    network = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    tape = Tape()
    timed = (lambda: itertools.repeat(batch), Compute(CPU), 3, tape, 4)
    assert loop._loop_seconds(network, None, *timed) > 0
    assert (tape.warm, tape.repeated) == (WARM_UP, [1 + 3] * 2)


@pytest.mark.bench
def test_the_whole_loop_names_its_bottleneck(tmp_path, capsys):
    write_tree(tmp_path / "images", train=5, val=1)
    torch.save(resnet34(num_classes=2).state_dict(), tmp_path / "teacher.pth")
    path = tmp_path / "loop.json"
    data = ["--data", str(tmp_path / "images"), "--teacher", str(tmp_path / "teacher.pth")]
    flags = ["--batch", "4", "--loop-steps", "2", "--workers", "0", "--json", str(path)]
    assert train_step.main([*TINY, *data, *flags]) == 0
    result = json.loads(path.read_text())
    speeds = result["images_per_second"]
    assert set(speeds) == {"loader", "teacher", "student", "whole"}
    assert result["bottleneck"] in speeds
    assert f"the bottleneck is the {result['bottleneck']}" in capsys.readouterr().out


def test_the_device_does_two_things_in_turn():
    assert loop.bottleneck({"loader": 3.0, "student": 2.0, "teacher": 0.9}) == "loader"
    assert loop.bottleneck({"loader": 2.8, "student": 2.0, "teacher": 0.9}) == "student"
    assert loop.bottleneck({"loader": 2.8, "student": 1.0, "teacher": 1.9}) == "teacher"


@pytest.mark.gpu
def test_on_a_gpu_kernels_and_memory_are_measured(gpu, tmp_path):
    path = tmp_path / "result.json"
    words = "ours+bf16,ours-unfused+bf16,obvious+bf16+channels_last+compile,twin"
    sizes = ["--batch", "8", "--size", "64", "--rounds", "2", "--steps", "2"]
    assert train_step.main([*sizes, "--rivals", words, "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["driver"]
    assert not result["own_processes"]
    for name, row in result["points"][0]["rows"].items():
        assert row["peak_mb"] > 100, name
        assert {"convolution forward", "optimizer"} <= set(row["time_ms"]), name
        assert sum(row["time_ms"].values()) < 1.5e3 * row["median_seconds"], name
        assert 0 < row["share_of_floor"] < 1, name
    assert result["points"][0]["rows"]["ours+bf16"]["time_ms"]["pack"] > 0


@pytest.mark.gpu
def test_on_a_gpu_the_largest_batch_that_fits_is_found(gpu):
    torch.cuda.set_per_process_memory_fraction(4e9 / torch.cuda.mem_get_info()[1])
    try:
        point = Point("reactnet_a", 2, 1024, 224, 1.0, gpu)
        with pytest.raises(RivalError) as caught:
            Runner(point, rivals.parse("obvious")).trial()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    facts = caught.value.facts
    assert facts["out_of_memory"]
    assert facts["largest_batch"] in (8, 16)  # 185 MB an image, 4 GB
