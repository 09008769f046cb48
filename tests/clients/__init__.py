"""Other people's programs with our modules in them, one short test each: make test-clients."""

import pytest


def client(name):
    """The module ``name`` of a library of the extra ``clients``, or a skip that says how to run."""
    return pytest.importorskip(name, reason=f"needs {name.split('.')[0]}: make test-clients")
