"""Binary networks by name, and the published weights."""

from tritonbnn.models.published import load_adambnn
from tritonbnn.models.registry import MODELS, build_model

__all__ = ["MODELS", "build_model", "load_adambnn"]
