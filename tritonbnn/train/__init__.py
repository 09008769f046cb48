"""Recipes, data and the loop that trains a network, in as many stages as the recipe has."""

from tritonbnn.train.job import Trained, configure, run

__all__ = ["Trained", "configure", "run"]
