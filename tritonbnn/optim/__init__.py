"""Optimisers of the field of binary networks, as torch's optimisers are used."""

from tritonbnn.optim.bop import Bop, Bop2ndOrder, to_signs_
from tritonbnn.optim.ivon import IVON, sampled_probabilities
from tritonbnn.optim.joint import Joint
from tritonbnn.optim.prediction import AdamPrediction, AdamWPrediction, SGDPrediction

__all__ = [
    "IVON",
    "AdamPrediction",
    "AdamWPrediction",
    "Bop",
    "Bop2ndOrder",
    "Joint",
    "SGDPrediction",
    "sampled_probabilities",
    "to_signs_",
]
