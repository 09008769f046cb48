"""Optimisers of the field of binary networks, as torch's optimisers are used."""

from tritonbnn.optim.bop import Bop, Bop2ndOrder, to_signs_

__all__ = ["Bop", "Bop2ndOrder", "to_signs_"]
