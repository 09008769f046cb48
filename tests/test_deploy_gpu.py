"""Packed networks by the GPU's kernels: the CPU engine's numbers, on a GPU or interpreted."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from tests.helpers import KERNEL_DEVICE, in_its_own_process, plus_minus
from tests.tape import Tape
from tests.test_aot import FIRST
from tests.test_deploy import BAD_IMAGES, NETWORKS, ODD, random_network
from tritonbnn import deploy
from tritonbnn.cli import UserError
from tritonbnn.compute import Compute
from tritonbnn.deploy import gpu, graphs, order
from tritonbnn.deploy.engine import Engine
from tritonbnn.deploy.fold import fold
from tritonbnn.deploy.gpu import GpuEngine
from tritonbnn.deploy.packed import Packed, Unit, check
from tritonbnn.deploy.plain import PlainNetwork, run_unit, weight_signs
from tritonbnn.kernels import config
from tritonbnn.kernels.config import Choice, TileConfig
from tritonbnn.kernels.shipped import SPILLED
from tritonbnn.kernels.targets import TARGETS
from tritonbnn.networks import open_network

KINDS = (
    {"shortcut": "identity", "kernel_size": 3},
    {"shortcut": "repeat", "kernel_size": 1, "widens": 2, "slope": False},
    {"shortcut": "pool", "kernel_size": 3, "stride": 2, "shift_in": False},
    {"shortcut": "project", "kernel_size": 3, "stride": 2, "widens": 3.3, "shift_out": False},
    {"shortcut": "identity", "kernel_size": 1, "slope": False, "shift_out": False},
)
"""Of units, one behind the other: every shortcut, and every vector there or not."""

PRODUCTS = {
    "int8": TileConfig(64, 32, 32, 4, 1),
    "popcount": TileConfig(32, 32, 32, 4, 1),
    "mma": TileConfig(32, 16, 1, 4, 1),
}


def steps(generator, most, *shape):
    """Multiples of 1/64, whose sums are exact in float32: many of them are 0."""
    return (generator.integers(-most, most + 1, shape) / 64).astype(np.float32)


def packed_network(kinds=KINDS, *, seed=0, shifts=True, **facts):
    """A small network of all kinds of units, whose sums are exact; images are multiples of 4."""
    generator = np.random.default_rng(seed)
    channels, units = 5, []
    for kind in kinds:
        kind = {"stride": 1, "slope": True, "shift_in": True, "shift_out": True, **kind}
        outputs, size = int(channels * kind.get("widens", 1)), kind["kernel_size"]
        signs = generator.integers(0, 2, (outputs, size, size, channels), np.uint8)
        weight = np.packbits(signs, axis=-1, bitorder="little")
        weight |= 0xFF & (-1 << channels % 8) if channels % 8 else 0  # bits that mean nothing
        project = kind["shortcut"] == "project"
        picked = np.eye(channels, dtype=np.float32)[generator.integers(0, channels, outputs)]
        units.append(
            Unit(
                **{name: kind[name] for name in ("kernel_size", "stride", "shortcut")},
                channels=channels,
                out_channels=outputs,
                weight=weight,
                scale=(0.5 ** generator.integers(3, 6, outputs)).astype(np.float32),
                constant=steps(generator, 32, outputs),
                shift_in=steps(generator, 8, channels) if kind["shift_in"] and shifts else None,
                slope=generator.integers(-1, 2, outputs).astype(np.float32)
                if kind["slope"]
                else None,
                shift_out=steps(generator, 8, outputs) if kind["shift_out"] else None,
                projection=picked if project else None,
                offset=steps(generator, 8, outputs) if project else None,
            )
        )
        channels = outputs
    packed = Packed(
        in_channels=2,
        size_multiple=4,
        stem_weight=generator.integers(-2, 3, (5, 2, 3, 3)).astype(np.float32),
        stem_offset=steps(generator, 64, 5),
        stem_stride=1,
        stem_pools=False,
        units=tuple(units),
        head_weight=np.eye(channels, dtype=np.float32)[:5],
        head_offset=steps(generator, 64, 5),
        **facts,
    )
    check(packed)
    return packed


IMAGES = torch.randint(-4, 5, (3, 2, 12, 4), generator=torch.Generator().manual_seed(0)).float()
"""Maps of 12 x 4, 6 x 2 and 3 x 1, an odd number of them."""
SMALL = IMAGES[:, :, :4]


def small_network(**facts):
    """A network of one unit and five classes."""
    return packed_network(KINDS[:1], **facts)


def of_gpu(packed, precision="fp32"):
    return GpuEngine(packed, KERNEL_DEVICE, precision)


@pytest.mark.parametrize("formulation", PRODUCTS)
def test_every_kind_of_unit_gives_the_cpu_s_logits(formulation, request):
    """A sum that is off by 2 or a sign that is wrong at 0 moves a logit by more than is allowed."""
    if formulation == "mma":
        request.getfixturevalue("one_bit_core")
    packed = packed_network()
    truth = PlainNetwork(packed).logits(IMAGES.numpy(), None, 1)
    with config.using(Choice(formulation, PRODUCTS[formulation])):
        engine = of_gpu(packed)
        logits = engine(IMAGES)
        again = engine(IMAGES[:1])
    np.testing.assert_allclose(logits, truth, rtol=0, atol=1e-6)
    np.testing.assert_allclose(again, truth[:1], rtol=0, atol=1e-6)


def test_what_each_product_reads_is_made_once(one_bit_core):
    packed = packed_network()
    engine = of_gpu(packed)
    with config.using(Choice("mma", PRODUCTS["mma"])):
        before = engine.memory()["weights"]
        engine(IMAGES)
        after = engine.memory()["weights"]
        engine(IMAGES[:2])
    assert before < after == engine.memory()["weights"]
    bits = sum(unit.weight.nbytes for unit in packed.units)
    assert bits < before


@pytest.mark.slow
@pytest.mark.parametrize(("name", "options", "shape"), NETWORKS + ODD)
def test_every_family_gives_the_cpu_s_logits(name, options, shape):
    widest = 0.25 if name == "reactnet_a" else 0.3
    model = random_network(name, **{**options, "width": min(options["width"], widest)})
    images = torch.randn(1, *shape[1:])  # more take minutes
    logits = of_gpu(fold(model))(images)
    with torch.no_grad():
        eager = model(images)
    np.testing.assert_allclose(logits, Engine(fold(model), 1)(images), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, eager, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_narrow_stream_is_rounded_once_a_unit(precision):
    """In bf16 without shifts before signs: the interpreter takes the signs before it rounds."""
    packed = packed_network(shifts=precision == "fp16")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def rounded(x):
        return torch.from_numpy(x).to(dtype).float().numpy()

    stem = torch.from_numpy(packed.stem_weight), torch.from_numpy(packed.stem_offset).to(dtype)
    x = torch.conv2d(IMAGES, stem[0], stem[1].float(), padding=1).to(dtype).float().numpy()
    for unit in packed.units:
        x = rounded(run_unit(unit, weight_signs(unit), x))
    truth = x.mean((2, 3)) @ packed.head_weight.T + packed.head_offset
    allowed = {"bf16": 0.1, "fp16": 0.02}[precision]
    np.testing.assert_allclose(of_gpu(packed, precision)(IMAGES), truth, rtol=0, atol=allowed)


def test_bytes_are_normalised_as_on_a_cpu():
    packed = small_network(transform={"mean": [0.485, 0.406], "std": [0.229, 0.225]})
    pixels = np.random.default_rng(0).integers(0, 256, (3, 2, 4, 8), np.uint8)
    table = order.byte_table(packed)
    floats = np.stack([row[pixels[:, c]] for c, row in enumerate(table)], axis=1)
    engine = of_gpu(packed)
    np.testing.assert_array_equal(engine(pixels), engine(floats))
    np.testing.assert_allclose(engine(pixels), Engine(packed)(pixels), atol=1e-4)


def test_predictions_are_the_cpu_s():
    packed = small_network(classes=tuple("abcde"))
    found, truth = (engine.predict(SMALL) for engine in (of_gpu(packed), Engine(packed)))
    assert found.classes == truth.classes
    assert found.indices.tolist() == truth.indices.tolist()
    np.testing.assert_allclose(found.probabilities, truth.probabilities, atol=1e-6)


def test_an_answer_is_of_the_images_kind():
    engine = of_gpu(small_network())
    small = SMALL
    truth = engine(small)
    assert isinstance(truth, torch.Tensor)
    assert truth.device == small.device
    for images in (
        small.double(),
        small.bfloat16(),
        small.to(memory_format=torch.channels_last),
        small.clone().requires_grad_(),
    ):
        assert torch.equal(engine(images), truth)
    frozen = small.numpy().copy()
    frozen.flags.writeable = False
    for array in (frozen, small.numpy().astype(">f4"), small.numpy()[::-1][::-1]):
        found = engine(array)
        assert isinstance(found, np.ndarray)
        np.testing.assert_array_equal(found, truth)
    assert engine(small[:0]).shape == (0, 5)
    assert engine(small[:0].numpy()).shape == (0, 5)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize(("images", "error", "message"), BAD_IMAGES)
def test_bad_images_are_refused(images, error, message, as_tensor):
    facts = {"in_channels": 3, "size_multiple": 16, "stem_weight": np.ones((5, 3, 3, 3), "f4")}
    facts |= {"stem_stride": 2, "stem_pools": True}  # fewer pixels to interpret
    engine = of_gpu(Packed(**{**vars(small_network()), **facts}))
    with pytest.raises(error, match=message):
        engine(torch.from_numpy(images) if as_tensor else images)


def test_a_number_that_a_maximum_loses_is_refused():
    packed = small_network()
    weight = np.ones((5, 2, 1, 1), np.float32)
    packed = Packed(**{**vars(packed), "stem_weight": weight, "stem_pools": True})
    engine = of_gpu(packed)
    images = np.ones((2, 2, 8, 8), np.float32)
    assert np.isfinite(engine(images)).all()
    images[1, :, 4, 4] = -np.inf
    with pytest.raises(ValueError, match="image 1 holds numbers that are not finite"):
        engine(images)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_numbers_beyond_a_narrow_stream_are_named():
    engine = of_gpu(small_network(), "fp16")
    with pytest.raises(ValueError, match="beyond those of fp16: give smaller ones, or another"):
        engine(np.full((1, 2, 4, 4), 60000, np.float32))


def test_an_odd_map_before_a_stride_is_refused():
    packed = Packed(**{**vars(packed_network()), "size_multiple": 1})
    with pytest.raises(ValueError, match="images of this size do not go through this network"):
        of_gpu(packed)(np.zeros((1, 2, 6, 6), np.float32))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "tpu"}, UserError, "unknown device 'tpu': use cpu, cuda or cuda:N"),
        ({"device": "cuda:"}, UserError, "unknown device 'cuda:'"),
        ({"device": "cuda:99"}, UserError, "no CUDA device|there is no cuda:99, only"),
        ({"device": "cuda", "threads": 2}, ValueError, "threads are of a CPU"),
        ({"precision": "bf16"}, ValueError, "a CPU runs packed networks in fp32, not in bf16"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(tmp_path, options, error, message):
    deploy.file.write(packed_network(), tmp_path / "net.tbnn")
    with pytest.raises(error, match=message) as caught:
        deploy.load(tmp_path / "net.tbnn", **options)
    assert "\n" not in str(caught.value)


def test_an_engine_is_loaded_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "place", lambda name: KERNEL_DEVICE)
    path = tmp_path / "net.tbnn"
    packed = small_network(classes=tuple("abcde"))
    deploy.file.write(packed, path)
    engine = deploy.load(path, device="cuda")
    assert engine.name.startswith("Triton, ")
    assert engine.classes == packed.classes
    assert torch.equal(engine(SMALL), of_gpu(packed)(SMALL))
    with pytest.raises(ValueError, match="precision 'int4': choose from fp32, bf16, fp16"):
        deploy.load(path, device="cuda", precision="int4")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="it is damaged: export it again"):
        deploy.load(path, device="cuda")


def test_the_commands_run_a_packed_file_on_the_gpu_that_they_are_given(tmp_path, monkeypatch):
    """And in its precision: the engine is made here where it runs."""
    asked = []
    monkeypatch.setattr(
        gpu, "GpuEngine", lambda packed, *how: asked.append(how) or GpuEngine(packed, KERNEL_DEVICE)
    )
    facts = {"name": "images", "dir": "", "channels": 2, "image_size": 4, "augment": "none"}
    packed = small_network(classes=tuple("abcde"), transform=facts)
    deploy.file.write(packed, tmp_path / "net.tbnn")
    compute = Compute(torch.device("cuda", 1), "bf16")
    model, _ = open_network(tmp_path / "net.tbnn", compute, engine="auto")
    assert asked == [(torch.device("cuda", 1), "bf16")]
    assert torch.equal(model(SMALL), of_gpu(packed)(SMALL))


WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "triton"):
            raise ModuleNotFoundError(f"no {name}")
sys.meta_path.insert(0, Refuse())
import tritonbnn.deploy
from tritonbnn import cli
cli.run(lambda _: tritonbnn.deploy.load("none.tbnn", device="cuda"))
"""


def test_a_gpu_without_torch_is_one_line():
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: device 'cuda' needs torch and Triton: install them")
    assert len(done.stderr.splitlines()) == 1


def test_a_call_reads_no_tensor_on_the_host():
    """A graph can hold it then."""
    network = of_gpu(packed_network(transform={"mean": [0.5] * 2, "std": [0.2] * 2}))._network
    pixels = torch.zeros((1, 2, 4, 4), dtype=torch.uint8, device=KERNEL_DEVICE)
    with torch.no_grad():
        Tape().record(lambda: network.logits(pixels))


class Replayed:
    """In place of a graph, where there is no GPU: what it would read, run anew."""

    made = ()

    def __init__(self, network, shape, dtype, pool):
        self.network, self.images = network, torch.zeros(shape, dtype=dtype)
        Replayed.made += (self,)

    def __call__(self, images):
        self.images.copy_(images)
        return self.network.logits(self.images)


class Sums:
    """A network that is quick, and notes how it would convolve."""

    device, dtype = torch.device("cpu"), torch.float32
    precision = None

    def logits(self, images):
        Sums.precision = torch.backends.cudnn.conv.fp32_precision
        return images.float().sum((1, 2, 3))[:, None]


@pytest.fixture
def captured(monkeypatch):
    """Calls whose captures are of the CPU."""
    monkeypatch.setattr(graphs, "CapturedCall", Replayed)
    monkeypatch.setattr(graphs, "Recorder", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 100 * len(Replayed.made))
    Replayed.made = ()
    calls = graphs.Graphs(Sums())
    calls._captures = True
    return calls


def test_a_shape_is_captured_when_it_comes_again(captured):
    calls = captured
    images = [torch.randint(9, (n, 2, 4, 4)).float() for n in (3, 3, 2, 3, 2)]
    for count, each in zip((0, 1, 1, 1, 2), images, strict=True):
        assert torch.equal(calls.logits(each), Sums().logits(each))
        assert len(Replayed.made) == count
    pixels = torch.randint(0, 256, (3, 2, 4, 4), dtype=torch.uint8)
    for _ in range(2):
        assert torch.equal(calls.logits(pixels), Sums().logits(pixels))
    assert len(Replayed.made) == 3
    assert calls.bytes_kept == 300
    assert torch.equal(calls.logits(images[0].half()), Sums().logits(images[0].half()))
    assert len(Replayed.made) == 3  # all floats come as the network's


def test_the_shape_that_was_not_used_for_longest_goes_first(captured, monkeypatch):
    calls = captured
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    for count in (1, 1, 2, 2, 1, 3, 1):
        calls.logits(torch.zeros(count, 1, 1, 1))
    assert len(Replayed.made) == 2
    for _ in range(2):
        calls.logits(torch.zeros(2, 1, 1, 1))
    assert len(Replayed.made) == 3


def test_what_no_graph_can_hold_runs_as_it_comes(captured, monkeypatch, caplog):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    calls = captured
    monkeypatch.setattr(graphs, "CapturedCall", refuse)
    for _ in range(3):
        assert calls.logits(torch.ones(2, 1, 1, 1)).tolist() == [[1], [1]]
    assert [r.message for r in caplog.records] == [
        "packed networks run without a CUDA graph: operation not permitted when stream is capturing"
    ]


def test_a_shape_that_is_refused_is_never_captured(captured, monkeypatch):
    def refuse(self, images):
        raise ValueError("images of this size do not go through this network")

    monkeypatch.setattr(Sums, "logits", refuse)
    for _ in range(3):
        with pytest.raises(ValueError, match="this size"):
            captured.logits(torch.ones(2, 1, 1, 1))
    assert Replayed.made == ()


def test_float32_is_not_rounded_for_a_tensor_core(captured):
    conv = torch.backends.cudnn.conv
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=True):
        before = conv.fp32_precision
        captured.logits(torch.ones(2, 1, 1, 1))
        assert conv.fp32_precision == before
    assert Sums.precision == "ieee"


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_graphs_give_what_the_kernels_give(gpu, precision):
    engine = GpuEngine(packed_network(), gpu, precision)
    images = plus_minus(5, 2, 12, 20)
    first = engine(images)
    found = {}

    def call(index):
        found[index] = [engine(images[index:]) for _ in range(20)]

    threads = [threading.Thread(target=call, args=(i,)) for i in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, answers in found.items():
        assert all(torch.equal(answer, first[index:]) for answer in answers)
    assert engine.memory()["scratch"] > 0
    assert engine._graphs._captures


COMPILED = """
import json, torch
from tests.test_deploy import random_network
from tests.test_deploy_gpu import packed_network
from tritonbnn.deploy.fold import fold
from tritonbnn.deploy.gpu import GpuNetwork
from tritonbnn.kernels import aot, config, shipped
from tritonbnn.kernels.targets import TARGETS
target = TARGETS[{target!r}]
packed = fold(random_network("reactnet_a")) if {whole} else packed_network()
dtype = torch.bfloat16 if target.bfloat16 else torch.float16
network = GpuNetwork(packed, torch.device("meta"), dtype)
size = 224 if {whole} else 12
images = torch.empty((33, packed.in_channels, size, size), dtype=dtype, device="meta")
with config.using(target):
    recorded = aot.record(lambda: network.logits(images))
launches = {{shipped._identity(each): each for each in recorded}}
made = [aot.compile_launch(launch, target) for launch in launches.values()]
print(json.dumps([(each.kernel, each.spill_bytes, each.shared_bytes) for each in made]))
"""


@pytest.mark.compile
@pytest.mark.parametrize("whole", [False, True], ids=["kinds", "reactnet_a"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_loaded_network_compiles(target, whole):
    """Within shared memory, and on the one-bit core where there is one.

    A whole network does, and within its registers, where its kernels are in no other gate: on that
    core. Of odd channels a kernel may spill.
    """
    core = "mma" in TARGETS[target].products
    if whole and target not in FIRST:
        pytest.skip("its kernels are those of training, which have a gate of their own")
    done = in_its_own_process("-c", COMPILED.format(target=target, whole=whole))
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    products = {row[0] for row in rows if "_conv_" in row[0] or "unit_mma" in row[0]}
    assert products
    assert core == (products == {"_unit_mma_kernel"})
    for _, spilled, shared in rows:
        assert not whole or spilled <= SPILLED
        assert shared <= TARGETS[target].shared_bytes
