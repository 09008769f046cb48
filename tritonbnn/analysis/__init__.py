"""What the signs, activations and steps of a binary network do while it trains (2106.11309)."""

from tritonbnn.analysis.histogram import EDGES, histogram
from tritonbnn.analysis.recorder import LEVELS, Recorder
from tritonbnn.analysis.saturation import PROBE_IMAGES, Probe, Saturation
from tritonbnn.analysis.signs import SignLayout

__all__ = [
    "EDGES",
    "LEVELS",
    "PROBE_IMAGES",
    "Probe",
    "Recorder",
    "Saturation",
    "SignLayout",
    "histogram",
]
