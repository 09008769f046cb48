"""Units in a row: each packs the signs that the next one starts with."""

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from tritonbnn.nn.unit import BinaryUnit, Handover


class Chain(nn.Sequential):
    """nn.Sequential, in which a unit hands packed signs to the unit that comes next.

    All modules are called, in order. A :class:`BinaryUnit` reads its stream for the shortcut, and
    needs the stream's signs as well. The unit before it has the stream at hand anyway, so it packs
    them on the way. Chains may be nested, as in a network of blocks.

    Signs are handed on only where no other code can come between two units. Where it can, the
    second one packs its own, with the same result. That is so around any other module, around a
    unit or chain that has hooks, whose ``forward`` was replaced or that is compiled by itself, and
    around a class that overrides :meth:`BinaryUnit.forward`.
    """

    def forward(self, x: Tensor, *, handover: Handover | None = None) -> Tensor:
        """Apply the modules in turn.

        Args:
            x: what the first module takes.
            handover: of the chain that this one is part of; None for a chain of its own.

        Raises:
            ValueError: another module before a unit returns what the unit cannot take.
        """
        handover = Handover() if handover is None else handover
        # backwards, as a unit must know which one comes after it
        calls, following = [], handover.following
        for module in reversed(self._modules.values()):
            takes = takes_handover(module)
            calls.append((module, takes, following))
            following = _first_unit(module) if takes else None
        for module, takes, following in reversed(calls):
            if takes:
                handover.following = following
                x = module(x, handover=handover)
            else:
                x = module(x)
                if following is not None:
                    _check_stream(x, module, following)
        return x


def _check_stream(x: Tensor, module: nn.Module, unit: BinaryUnit) -> None:
    """Raise ValueError where ``module``'s output does not fit the unit that comes next."""
    fits = isinstance(x, Tensor) and x.dim() == 4 and x.shape[1] == unit.in_channels
    if not fits:
        given = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise ValueError(
            f"{type(module).__name__} returned {given}, but the unit after it takes "
            f"(N, {unit.in_channels}, H, W): put a module there that returns that"
        )


def takes_handover(module: nn.Module) -> bool:
    """Whether a call of ``module`` runs nothing but the ``forward`` of a unit or a chain."""
    kind = BinaryUnit if isinstance(module, BinaryUnit) else Chain
    return (
        isinstance(module, kind)
        and type(module).forward is kind.forward
        and "forward" not in module.__dict__
        and module._compiled_call_impl is None
        and not (module._forward_pre_hooks or module._forward_hooks)
        and not (module._backward_pre_hooks or module._backward_hooks)
        and not torch_module._has_any_global_hook()
    )


def _first_unit(module: nn.Module) -> BinaryUnit | None:
    """The unit that a call of ``module``, which takes a handover, begins with.

    None where something else may run before it.
    """
    while isinstance(module, Chain):
        first = next(iter(module._modules.values()), None)
        if first is None or not takes_handover(first):
            return None
        module = first
    return module if isinstance(module, BinaryUnit) else None
