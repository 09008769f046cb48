"""Binary networks by name, and the published weights."""

from tritonbnn.models.published import load_adambnn, network_in
from tritonbnn.models.registry import MODELS, build_model, network_of_weights

__all__ = ["MODELS", "build_model", "load_adambnn", "network_in", "network_of_weights"]
