"""Which parameters of a network are what, decided by module type."""

from collections.abc import Iterator

from torch import nn
from torch.nn.utils import parametrize

from tritonbnn.nn.activations import RPReLU, RSign
from tritonbnn.nn.layers import BinaryConv1d, BinaryConv2d, BinaryLinear
from tritonbnn.nn.unit import BinaryUnit

_SHIFTS = {
    RSign: ("shift",),
    RPReLU: ("shift_in", "shift_out"),
    BinaryConv1d: ("shift",),
    BinaryConv2d: ("shift",),
    BinaryLinear: ("shift",),
    BinaryUnit: ("shift_in", "shift_mid", "shift_out"),
}


_BINARY = (BinaryConv1d, BinaryConv2d, BinaryLinear, BinaryUnit)
_PRUNED = "_orig"  # what torch.nn.utils.prune appends to the name of what it masks


def decayed_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that AdamBNN decays (2106.11309, methods 1.5).

    They are all convolution weights, and all learnable shifts: the published code decays what has
    four dimensions, and there a shift has shape (1, C, 1, 1). Where one is parametrised or pruned,
    it is the parameters that it is computed from.
    """
    for module in model.modules():
        for _, weight in _stored(module, "weight"):
            if weight.dim() == 4 or isinstance(module, BinaryConv1d):
                yield weight
        for kind, names in _SHIFTS.items():
            if isinstance(module, kind):
                for name in names:
                    yield from (shift for _, shift in _stored(module, name))


def binary_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that are binarised in step 2, by their name in the state dict.

    Where a weight is parametrised or pruned, it is the parameters that it is computed from.
    """
    return {
        _joined(path, name): weight
        for path, module in model.named_modules()
        if isinstance(module, _BINARY)
        for name, weight in _stored(module, "weight")
    }


def binary_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers whose weights :func:`binary_weights` has, under the same names."""
    return {
        _joined(path, name): module
        for path, module in model.named_modules()
        if isinstance(module, _BINARY)
        for name, _ in _stored(module, "weight")
    }


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _stored(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that ``module``'s attribute ``name`` is, or is computed from, by their names.

    The attribute itself is not looked at, as that may compute it.
    """
    for key in (name, name + _PRUNED):
        parameter = module._parameters.get(key)
        if parameter is not None:
            yield key, parameter
    if parametrize.is_parametrized(module, name):
        originals = module.get_submodule(f"parametrizations.{name}")
        for key, parameter in originals.named_parameters(recurse=False):
            yield f"parametrizations.{name}.{key}", parameter
