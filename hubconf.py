"""The networks for torch.hub: ``torch.hub.load(this folder, "reactnet_a", source="local")``.

All take the options of :func:`tritonbnn.models.build_model`. None has weights yet.
"""

from typing import Any

from tritonbnn.models import build_model

dependencies = ["torch", "safetensors"]


def reactnet_a(**options: Any) -> Any:
    """ReActNet-A (2003.03488)."""
    return build_model("reactnet_a", **options)


def reactnet_18(**options: Any) -> Any:
    """ReActNet in ResNet-18's layout (2003.03488)."""
    return build_model("reactnet_18", **options)


def birealnet_18(**options: Any) -> Any:
    """Bi-Real Net 18 (1808.00278)."""
    return build_model("birealnet_18", **options)


def binarynet(**options: Any) -> Any:
    """BinaryNet (1602.02830), which is for images of about 32 x 32 alone."""
    return build_model("binarynet", **{"small_images": True, **options})


def binary_alexnet(**options: Any) -> Any:
    """BNN's AlexNet (1602.02830), with real first and last layers."""
    return build_model("binary_alexnet", **options)


def xnornet(**options: Any) -> Any:
    """XNOR-Net's AlexNet (1603.05279)."""
    return build_model("xnornet", **options)
