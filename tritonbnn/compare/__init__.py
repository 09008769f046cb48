"""Recipes side by side, several seeds each: ``python -m tritonbnn.compare``."""
