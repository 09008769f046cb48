"""Recipes, data and the loop that trains a network in two steps."""
