"""How a network is computed, as far as no other test sees it."""

import torch
from torch import nn

from tritonbnn.compute import Compute


def test_more_sizes_of_a_batch_are_compiled_than_torch_does_by_default():
    network = nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    limits = torch._dynamo.config
    sizes = range(2, limits.recompile_limit + 5)
    with limits.patch(fail_on_recompile_limit_hit=True):
        Compute(torch.device("cpu"), compiled=True).place(network)
        for size in sizes:
            x = torch.randn(size, 8)
            torch.testing.assert_close(network(x), network.forward(x))
