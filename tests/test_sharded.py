"""FSDP2: a network that is sharded unit by unit, or as a whole, trains as one that is not."""

import copy
import os

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_module

from tests.helpers import gradient
from tritonbnn.models import build_model
from tritonbnn.nn import BinaryConv2d, BinaryLinear, BinaryUnit, RPReLU, RSign

pytestmark = pytest.mark.slow  # processes of its own

LAYERS = [
    (lambda: BinaryUnit(8, 8, 3), (2, 8, 4, 4)),
    (lambda: BinaryConv2d(8, 8, 3, padding=1), (2, 8, 4, 4)),
    (lambda: BinaryLinear(8, 8), (2, 8)),
    (lambda: RSign(8), (2, 8)),
    (lambda: RPReLU(8), (2, 8)),
]


def outputs_and_parameters(model, whole, gather=lambda p: p):
    """Of three steps of SGD on this process's images, gradients averaged over all of them."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    outputs = []
    for step in range(3):
        x = gradient(2, 3, 16, 16, dtype=torch.float64, seed=2 * step + distributed.get_rank())
        y = model(x)
        optimizer.zero_grad()
        y.square().sum().backward()
        if whole:
            for parameter in model.parameters():
                distributed.all_reduce(parameter.grad)
                parameter.grad /= distributed.get_world_size()
        optimizer.step()
        outputs.append(y.detach())
    return outputs, [gather(p.detach()) for p in model.parameters()]


def one_of_two(rank, folder):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    network = build_model("reactnet_a", width=0.25, num_classes=3, small_images=True).double()
    results = {"whole": outputs_and_parameters(copy.deepcopy(network), whole=True)}
    for name, sharded in (("units", BinaryUnit), ("root", ())):
        model = copy.deepcopy(network)
        for module in model.modules():
            if isinstance(module, sharded):
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        gather = type(next(model.parameters()).data).full_tensor
        results[name] = outputs_and_parameters(model, whole=False, gather=gather)
    results["errors"] = []
    for make, shape in LAYERS:
        try:
            distribute_module(make(), mesh)(torch.zeros(shape))
        except TypeError as error:
            results["errors"].append(str(error))
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    multiprocessing.spawn(one_of_two, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", ["units", "root"])
def test_a_sharded_network_trains_as_a_whole_one(results, name):
    for result in results:
        torch.testing.assert_close(result[name], result["whole"], rtol=1e-9, atol=1e-9)


def test_distributed_tensors_without_that_are_one_line(results):
    for result in results:
        assert len(result["errors"]) == len(LAYERS)
        assert all("DTensors are not supported in a call" in e for e in result["errors"])
