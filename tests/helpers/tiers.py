"""Parameters of a test that only the full tier runs."""

import pytest


def full(*values):
    """These values, marked; for lists of parameters, after those of the plain tier."""
    return [pytest.param(value, marks=pytest.mark.full) for value in values]
