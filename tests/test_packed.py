"""Weights stored as bits: the same network, the same training with Bop, 0.125 bytes each."""

import copy
import io
import socket

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

from tests.helpers import gradient, plus_minus
from tritonbnn import kernels
from tritonbnn.analysis.signs import SignLayout
from tritonbnn.models import build_model
from tritonbnn.nn import BinaryConv2d, BinaryLinear, BinaryUnit, binary_weights, pack_weights_
from tritonbnn.optim import Bop, Bop2ndOrder, to_signs_
from tritonbnn.packed import PackedWeight

FORMS = [
    pytest.param(lambda p: Bop(p, threshold=1e-5, gamma=0.1), id="bop"),
    pytest.param(
        lambda p: Bop2ndOrder(p, threshold=0.2, gamma=0.1, sigma=0.05),
        id="second_order",
        marks=pytest.mark.slow,
    ),
]


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1),
        BinaryUnit(20, 20, 3),
        BinaryUnit(20, 40, 1),
        BinaryConv2d(40, 33, 1, shift=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        BinaryLinear(33, 10),
    )
    to_signs_(binary_weights(model).values())
    return model


def rest(model):
    binary = {id(w) for w in binary_weights(model).values()}
    return [p for p in model.parameters() if id(p) not in binary]


def train(model, make, steps, device):
    model.to(device)
    optimizers = [make(list(binary_weights(model).values())), torch.optim.SGD(rest(model), 0.1)]
    losses = []
    for step in range(steps):
        images = gradient(3, 3, 4, 4, seed=step).to(device)
        labels = torch.arange(3, device=device)
        loss = F.cross_entropy(model(images), labels)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append((loss.item(), optimizers[0].flips.item()))
    return losses, optimizers[0]


@pytest.mark.parametrize("make", FORMS)
def test_it_trains_as_signs_in_floats_do(launchers, device, make):
    plain, packed = network(), network()
    assert pack_weights_(packed) == 4
    steps = 2 if launchers is kernels else 6  # the interpreter takes its time
    expected, _ = train(plain, make, steps, device)
    got, _ = train(packed, make, steps, device)
    assert got == expected
    assert sum(flips for _, flips in got) > 0
    for key, value in plain.state_dict().items():
        assert torch.equal(packed.state_dict()[key], value), key


@pytest.mark.parametrize("shape", [(5, 33, 3, 3), (7, 64, 1, 1), (3, 31)])
def test_it_is_a_tensor_of_signs(shape):
    signs = plus_minus(*shape)
    weight = PackedWeight.of(signs)
    assert weight.shape == signs.shape
    assert torch.equal(weight.unpacked(), signs)
    assert torch.equal(weight + 0, signs)
    assert torch.equal(weight.abs(), torch.ones(shape))
    assert torch.equal(torch.sign(weight.flatten(1)), signs.flatten(1))
    assert weight.unpacked().stride() == weight.stride()
    clone = weight.clone()
    with torch.no_grad():
        clone.copy_(-signs)
    assert torch.equal(clone.unpacked(), -signs)
    assert torch.equal(weight.unpacked(), signs)
    assert isinstance(weight.to(torch.bfloat16), PackedWeight)
    assert weight.to(torch.bfloat16).dtype == torch.bfloat16


def test_a_step_takes_an_eighth_of_a_byte_and_the_average():
    """Parameter and optimiser state as they lie in memory; channels fill their words."""

    def bytes_a_weight(make):
        model = nn.Sequential(BinaryConv2d(64, 64, 3, padding=1))
        to_signs_(model.parameters())
        weights = model[0].weight.numel()
        pack_weights_(model)
        optimizer = make(model.parameters())
        model(gradient(1, 64, 4, 4)).sum().backward()
        optimizer.step()
        state = [v for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
        stored = [model[0].weight.packed, *state]
        return sum(t.untyped_storage().nbytes() for t in stored) / weights

    assert bytes_a_weight(Bop) == 4.125
    assert bytes_a_weight(Bop2ndOrder) == 8.125


def test_state_dicts_are_those_of_the_unpacked_network(tmp_path):
    plain, packed = network(1), network(2)
    pack_weights_(packed)
    packed.load_state_dict(plain.state_dict())
    images = gradient(2, 3, 6, 6)
    assert torch.equal(packed.eval()(images), plain.eval()(images))
    back = network(3)
    back.load_state_dict(packed.state_dict())
    assert torch.equal(back.eval()(images), plain(images))
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    torch.load(file, weights_only=True)


def test_a_copy_is_one_of_its_own():
    model = network()
    pack_weights_(model)
    other = copy.deepcopy(model)
    assert isinstance(other[3].weight, PackedWeight)
    with torch.no_grad():
        other[3].weight.copy_(-model[3].weight.unpacked())
    assert torch.equal(other[3].weight.unpacked(), -model[3].weight.unpacked())
    assert type(other[3].weight.requires_grad) is bool


def test_real_weights_stay_real_and_shared_ones_shared():
    model = nn.Sequential(
        BinaryConv2d(8, 8, 1), BinaryConv2d(8, 8, 1), BinaryConv2d(8, 8, 1, binary_weight=False)
    )
    model[1].weight = model[0].weight
    assert pack_weights_(model) == 2
    assert model[0].weight is model[1].weight
    assert not isinstance(model[2].weight, PackedWeight)
    assert pack_weights_(model) == 2  # again changes nothing


def test_a_whole_network_runs_packed():
    torch.manual_seed(0)
    model = build_model("reactnet_a", width=0.25, num_classes=10, small_images=True)
    to_signs_(binary_weights(model).values())
    other = copy.deepcopy(model)
    pack_weights_(other)
    images = gradient(2, 3, 32, 32)
    assert torch.equal(other(images), model(images))


def _process(rank, port, folder):
    distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    torch.manual_seed(rank)  # the wrapper sends the first process's weights to all
    model = nn.Sequential(BinaryConv2d(20, 33, 3, padding=1))
    to_signs_(model.parameters())
    pack_weights_(model)
    wrapped = DistributedDataParallel(model)
    optimizer = Bop(model.parameters(), threshold=1e-3, gamma=0.2)
    for step in range(4):
        optimizer.zero_grad()
        images = gradient(2, 20, 4, 4, seed=step)[rank : rank + 1]
        wrapped(images).square().mean().backward()
        optimizer.step()
    torch.save((model.state_dict(), optimizer.flips), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_process, (port, str(tmp_path)), nprocs=2)
    torch.manual_seed(0)
    model = nn.Sequential(BinaryConv2d(20, 33, 3, padding=1))
    to_signs_(model.parameters())
    optimizer = Bop(model.parameters(), threshold=1e-3, gamma=0.2)
    for step in range(4):
        optimizer.zero_grad()
        for image in gradient(2, 20, 4, 4, seed=step).split(1):  # parts add up as processes do
            (model(image).square().mean() / 2).backward()
        optimizer.step()
    assert optimizer.flips > 0
    for rank in (0, 1):
        state, flips = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(state["0.weight"], model[0].weight)
        assert flips == optimizer.flips


def test_flips_are_counted_alike():
    counts = []
    for packed in (False, True):
        model = network()
        if packed:
            pack_weights_(model)
        layout = SignLayout(list(binary_weights(model).values()))
        before = layout.signs(list(binary_weights(model).values()))
        _, optimizer = train(model, lambda p: Bop(p, threshold=1e-5, gamma=0.1), 1, "cpu")
        after = layout.signs(list(binary_weights(model).values()))
        counts.append(layout.differing(before, after).tolist())
        assert sum(counts[-1]) == optimizer.flips > 0
    assert counts[0] == counts[1]


def test_bad_input_is_named():
    model = network()
    pack_weights_(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(gradient(2, 3, 6, 6)).sum().backward()
    with pytest.raises(TypeError, match="cannot change packed weights, which are signs only"):
        optimizer.step()
    with pytest.raises(ValueError, match="no binary weights to pack"):
        pack_weights_(nn.Conv2d(3, 3, 1))
    pruned = nn.Sequential(BinaryConv2d(8, 8, 1))
    prune.random_unstructured(pruned[0], "weight", 0.5)
    with pytest.raises(ValueError, match=r"0\.weight_orig is parametrised or pruned"):
        pack_weights_(pruned)
