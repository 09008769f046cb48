"""Fixtures that every test may ask for."""

import logging
import os
import signal
import sys
from unittest import mock

import pytest
import torch

from tritonbnn import eager, native
from tritonbnn.eager import common, conv
from tritonbnn.native import library

# A shell ignores Ctrl-C for what it starts in the background, and what is ignored stays so in all
# processes that are started from there. A test that sends one would wait for ever.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

HAS_GPU = torch.cuda.is_available()

# Triton decides when a function is decorated whether it is interpreted, so this must be its first
# import. Afterwards the variable is gone again: only tests that ask for kernels get them.
with mock.patch.dict(os.environ, {} if HAS_GPU else {"TRITON_INTERPRET": "1"}):
    import triton.experimental.gluon  # noqa: F401  the interpreter's first launch would import it

    from tritonbnn import kernels

SENTINEL = -0x5EED
"""What an integer tensor holds where nothing was written, if its dtype can hold it."""


@pytest.fixture(autouse=True)
def fresh_logger():
    """The package's logger as an import leaves it, whatever ran in this process before."""
    logger = logging.getLogger("tritonbnn")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture(autouse=not HAS_GPU)
def guarded_launches(monkeypatch):
    """Names of the kernels that were interpreted, every load and store of them checked."""
    from tests import interpreter_guard  # it imports the interpreter, which must wait for this file

    return interpreter_guard.watch(monkeypatch)


@pytest.fixture(params=["eager", "kernels", "native"])
def launchers(request, monkeypatch, unwritten_memory):
    """The eager twins, the kernels, the C functions; the operators of ``tritonbnn.ops`` follow."""
    if request.param == "eager":  # in several chunks, as at real sizes
        monkeypatch.setattr(common, "CHUNK", 100)
        monkeypatch.setattr(conv, "FILTERS", 7)
        monkeypatch.setenv("TRITONBNN_LAUNCHERS", "eager")
        return eager
    if request.param == "native":
        if not library.available():
            pytest.skip(library.reason())
        monkeypatch.setenv("TRITONBNN_LAUNCHERS", "native")
        return native
    if not HAS_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return kernels


@pytest.fixture
def device(launchers):
    """Where the launchers under test run."""
    from tests.helpers import device_of  # it imports kernels, which must wait for this file

    return device_of(launchers)


@pytest.fixture
def gpu():
    """A CUDA device, or a skip."""
    if not HAS_GPU:
        pytest.skip("needs CUDA")
    return torch.device("cuda")


@pytest.fixture
def one_bit_core(monkeypatch, unwritten_memory):
    """A GPU with the instruction, or its emulation."""
    from tests import gluon_numpy
    from tests.helpers import KERNEL_DEVICE
    from tritonbnn.kernels import below_triton

    if not HAS_GPU:
        gluon_numpy.emulate(monkeypatch)
    elif not below_triton.runs(KERNEL_DEVICE):
        pytest.skip("needs a GPU with a one-bit tensor core: sm_80, 86, 89 or 90")


@pytest.fixture
def unwritten_memory(monkeypatch):
    """Fill what the package gets uninitialised, so that an unwritten element is seen."""

    def filling(empty):
        def filled(*args, **kwargs):
            tensor = empty(*args, **kwargs)
            if not sys._getframe(1).f_globals.get("__name__", "").startswith("tritonbnn."):
                return tensor
            if tensor.is_floating_point():
                return tensor.fill_(torch.nan)
            return tensor.fill_(max(SENTINEL, torch.iinfo(tensor.dtype).min))

        return filled

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, filling(getattr(torch, name)))
    yield
    if rules := sys.modules.get("torch._dynamo.trace_rules"):
        rules.clear_lru_cache()  # what torch.compile has learnt of torch in the meantime
