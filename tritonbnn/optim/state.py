"""An optimiser's state as plain tensors and numbers, and back, bit for bit.

It goes through ``Optimizer.state_dict()``, so any optimiser that torch can save is saved. A file of
tensors knows neither strides nor which numbers lay on the host, and torch's own loading turns every
state into its parameter's dtype. So both are noted here, and put back.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tritonbnn.cli import UserError

_NUMBERS = (bool, int, float, str, type(None))
_ALONE = "_alone"  # what an optimiser keeps of no parameter
_GROUP = "_group"


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], dict]:
    """All that an optimiser keeps.

    Args:
        model: whose parameters it updates.
        optimizer: over them.

    Returns:
        Tensors by ``KEY.PARAMETER``, and facts that JSON can hold.

    Raises:
        UserError: it keeps something that is neither a tensor nor a number.
    """
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"numbers": {}, "strides": {}, "host": []}
    packed = optimizer.state_dict()
    named = list(_named(model, optimizer))
    for index, entries in packed["state"].items():
        name, parameter = named[index] if isinstance(index, int) else (_ALONE, None)
        if parameter is None:  # some keep numbers under a name of their own
            entries = {index: entries}
        for key, value in entries.items():
            full = f"{key}.{name}"
            if isinstance(value, Tensor) and isinstance(key, str) and "." not in key:
                tensors[full] = value
                _note_place(full, value, parameter, facts)
            elif isinstance(value, _NUMBERS) and isinstance(key, str):
                facts["numbers"].setdefault(name, {})[key] = value
            else:
                raise _cannot_keep(optimizer, key, value)
    for index, group in enumerate(packed["param_groups"]):
        for key, value in group.items():
            if isinstance(value, Tensor):
                tensors[f"{_GROUP}.{index}.{key}"] = value
    facts["groups"] = [
        {key: value for key, value in group.items() if key != "params" and _is_plain(value)}
        for group in packed["param_groups"]
    ]
    for key in sorted(packed.keys() - {"state", "param_groups"}):
        if not _is_plain(packed[key]):
            raise _cannot_keep(optimizer, key, packed[key])
        facts.setdefault("beside", {})[key] = packed[key]
    return tensors, facts


def restore_optimizer(
    model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor], facts: dict[str, Any]
) -> None:
    """Put back what :func:`optimizer_state` gave.

    Args:
        model: as it was.
        optimizer: freshly built over its parameters, by the same settings.
        tensors: as saved; they may have lost their strides and their device.
        facts: as saved; empty for a checkpoint of format 1, which had tensors alone.
    """
    named = list(_named(model, optimizer))
    index_of: dict[str, Any] = {name: index for index, (name, _) in enumerate(named)}
    index_of[_ALONE] = _ALONE
    state: dict[Any, dict[str, Any]] = {}
    groups = optimizer.state_dict()["param_groups"]
    for full, tensor in tensors.items():
        key, _, name = full.partition(".")
        if key == _GROUP:
            index, _, key = name.partition(".")
            groups[int(index)][key] = tensor
        else:
            state.setdefault(index_of[name], {})[key] = tensor
    for name, numbers in facts.get("numbers", {}).items():
        state.setdefault(index_of[name], {}).update(numbers)
    for group, saved in zip(groups, facts.get("groups", ()), strict=False):
        for key, value in saved.items():  # JSON has no tuples
            group[key] = tuple(value) if isinstance(group.get(key), tuple) else value
    alone = state.pop(_ALONE, {})
    packed = {"state": state | alone, "param_groups": groups, **facts.get("beside", {})}
    optimizer.load_state_dict(packed)
    for index, entries in state.items():
        name, parameter = named[index]
        loaded = optimizer.state[parameter]
        for key, value in entries.items():
            if isinstance(value, Tensor) and isinstance(loaded.get(key), Tensor):
                loaded[key] = _placed(f"{key}.{name}", value, loaded[key], parameter, facts)


def _named(model: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """The optimiser's parameters with their names, in the order of its own numbering."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield name_of[id(parameter)], parameter


def _is_plain(value: Any) -> bool:
    """Whether JSON gives it back, but for a tuple, which becomes a list."""
    if isinstance(value, list | tuple):
        return all(isinstance(item, _NUMBERS) for item in value)
    return isinstance(value, _NUMBERS)


def _note_place(
    full: str, value: Tensor, parameter: nn.Parameter | None, facts: dict[str, Any]
) -> None:
    """Note where a tensor lies, unless it lies as its parameter does."""
    if value.stride() != _usual_strides(value, parameter):
        facts["strides"][full] = list(value.stride())
    if parameter is not None and value.device.type == "cpu" != parameter.device.type:
        facts["host"].append(full)


def _usual_strides(value: Tensor, parameter: nn.Parameter | None) -> tuple[int, ...]:
    """The parameter's, where the shape is its; else those of memory in order."""
    if parameter is not None and value.shape == parameter.shape:
        return parameter.stride()
    return torch.empty(value.shape, device="meta").stride()


def _placed(
    full: str, saved: Tensor, loaded: Tensor, parameter: nn.Parameter | None, facts: dict[str, Any]
) -> Tensor:
    """A saved tensor with its dtype, its strides, and its device."""
    device = loaded.device
    if parameter is not None and full in facts.get("host", ()):
        device = torch.device("cpu")
    dtype = loaded.dtype if full.startswith("step.") else saved.dtype
    strides = facts.get("strides", {}).get(full) or _usual_strides(saved, parameter)
    # Fused kernels walk a weight and its state as flat memory. They would pair the wrong numbers
    # where one is NHWC and the other NCHW.
    empty = torch.empty_strided(saved.shape, tuple(strides), dtype=dtype, device=device)
    return empty.copy_(saved)


def _cannot_keep(optimizer: Optimizer, key: object, value: object) -> UserError:
    kind = type(optimizer)
    return UserError(
        f"optimizer {kind.__module__}.{kind.__qualname__} keeps {key!r} of type"
        f" {type(value).__name__}, and a run could not go on from that: keep tensors and numbers"
    )
