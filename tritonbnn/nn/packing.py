"""Networks without latent weights: what is stored of a binary weight is its bit."""

from typing import Any

from torch import Tensor, nn

from tritonbnn.nn.parameters import binary_layers
from tritonbnn.packed import PackedWeight


def pack_weights_(model: nn.Module) -> int:
    """Keep the binary weights of a network as bits, in place: one thirty-second of their memory.

    Such a weight has no real number behind its sign, so only an optimiser that flips signs trains
    it: :class:`tritonbnn.optim.Bop` or :class:`tritonbnn.optim.Bop2ndOrder`, made afterwards. Its
    scale alpha is 1. The gradient is real as before. ``state_dict`` has the weights as +1 and -1 in
    float32, and ``load_state_dict`` takes signs, so checkpoints are those of the unpacked network.

    Args:
        model: its layers of real weights (``binary_weight=False``) are left as they are.

    Returns:
        How many layers have packed weights now.

    Raises:
        ValueError: a weight is parametrised or pruned, or of a BinaryConv1d, or there is no binary
            weight.
    """
    packed: dict[Tensor, nn.Parameter] = {}
    count = 0
    for name, layer in binary_layers(model).items():
        if not getattr(layer, "binary_weight", True):
            continue
        weight = layer._parameters.get("weight")
        if weight is None:
            raise ValueError(f"{name} is parametrised or pruned: remove that before packing it")
        if weight.dim() == 3:
            raise ValueError(
                f"{name} is of a BinaryConv1d, whose weights cannot be packed: "
                "use a BinaryConv2d with a kernel of one row"
            )
        count += 1
        if isinstance(weight, PackedWeight):
            continue
        if weight not in packed:  # layers may share one
            packed[weight] = nn.Parameter(PackedWeight.of(weight), weight.requires_grad)
        layer.weight = packed[weight]
        layer.register_state_dict_post_hook(_unpack_in_state)
    if not count:
        raise ValueError("the network has no binary weights to pack")
    return count


def _unpack_in_state(
    layer: nn.Module, state: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    weight = state.get(f"{prefix}weight")
    if isinstance(weight, PackedWeight):
        state[f"{prefix}weight"] = weight.unpacked()
