"""Units whose batch statistics are shared: two processes equal one that has the whole batch."""

import os

import pytest
import torch
from torch import distributed, multiprocessing, nn

from tritonbnn.nn import BinaryUnit

PLANS = ("keep", "recompute", "fused")
SHARES = (3, 2)  # images of each process


def problem(plan, binary):
    """A unit with random parameters, a batch, and an upstream gradient, in float64."""
    torch.manual_seed(0)
    unit = BinaryUnit(17, 34, 1, binary_weight=binary, plan=plan).double()
    for parameter in unit.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x = torch.randn(sum(SHARES), 17, 4, 3, dtype=torch.float64)
    return unit, x, torch.randn(sum(SHARES), 34, 4, 3, dtype=torch.float64)


def outcome(unit, x, grad):
    """Output, gradients and running statistics of one pass."""
    x = x.clone().requires_grad_()
    z = unit(x)
    z.backward(grad)
    return {
        "z": z.detach(),
        "dx": x.grad,
        "parameters": {name: p.grad for name, p in unit.named_parameters()},
        "running": [unit.bn.running_mean, unit.bn.running_var],
    }


def join(rank, folder):
    """Meet the other process; which images are this one's."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    return slice(0, SHARES[0]) if rank == 0 else slice(SHARES[0], None)


def one_of_two(rank, folder):
    """What a process does: its share of each problem."""
    own = join(rank, folder)
    results = {}
    for plan in PLANS:
        for binary in (True, False):
            unit, x, grad = problem(plan, binary)
            unit = nn.SyncBatchNorm.convert_sync_batchnorm(unit)
            results[plan, binary] = outcome(unit, x[own], grad[own])
    unit, x, grad = problem("keep", True)
    unit = nn.SyncBatchNorm.convert_sync_batchnorm(unit)
    own = slice(None) if rank == 0 else slice(0, 0)
    results["one without images"] = outcome(unit, x[own], grad[own])
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def one_of_two_by_kernels(rank, folder):
    """The same by the kernels, interpreted in this process: Triton is not imported so far."""
    os.environ |= {"TRITON_INTERPRET": "1", "TRITONBNN_LAUNCHERS": "triton"}
    own = join(rank, folder)
    results = {}
    for binary in (True, False):
        unit, x, grad = problem("keep", binary)
        unit = nn.SyncBatchNorm.convert_sync_batchnorm(unit).float()
        results["kernels", binary] = outcome(unit, x[own].float(), grad[own].float())
    torch.save(results, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def results_of(process, folder):
    multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_of(one_of_two, tmp_path_factory.mktemp("sync"))


@pytest.fixture(scope="module")
def results_of_kernels(tmp_path_factory):
    return results_of(one_of_two_by_kernels, tmp_path_factory.mktemp("kernels"))


@pytest.mark.slow
@pytest.mark.parametrize("binary", [True, False], ids=["step2", "step1"])
def test_the_kernels_of_two_processes_equal_one(results_of_kernels, binary):
    unit, x, grad = problem("keep", binary)
    unit, x, grad = unit.float().double(), x.float().double(), grad.float().double()
    whole = outcome(unit, x, grad)
    first, second = (r["kernels", binary] for r in results_of_kernels)
    for name in ("z", "dx"):
        found = torch.cat((first[name], second[name])).double()
        assert (found - whole[name]).norm() <= 1e-5 * whole[name].norm(), name
    for name, expected in whole["parameters"].items():
        total = first["parameters"][name] + second["parameters"][name]
        assert (total - expected).norm() <= 1e-5 * expected.norm(), name
    for a, b in zip(first["running"], whole["running"], strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("binary", [True, False], ids=["step2", "step1"])
def test_two_processes_equal_one(results, plan, binary):
    unit, x, grad = problem(plan, binary)
    whole = outcome(unit, x, grad)
    first, second = (r[plan, binary] for r in results)
    for name in ("z", "dx"):
        assert torch.allclose(torch.cat((first[name], second[name])), whole[name], rtol=1e-10)
    for name, expected in whole["parameters"].items():
        total = first["parameters"][name] + second["parameters"][name]
        assert (total - expected).abs().max() <= 1e-10 * expected.abs().max(), name
    for a, b in zip(first["running"], whole["running"], strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


def test_a_process_without_images_keeps_the_same_averages(results):
    whole = outcome(*problem("keep", True))
    for result in results:
        for a, b in zip(result["one without images"]["running"], whole["running"], strict=True):
            assert torch.allclose(a, b, rtol=1e-12)
