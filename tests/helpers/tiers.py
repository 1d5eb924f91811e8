"""Parameters of a test that only the full tier runs."""

import pytest


def full(*values):
    """Mark these values, or tuples of them, for a list of parameters."""
    tuples = [value if isinstance(value, tuple) else (value,) for value in values]
    return [pytest.param(*value, marks=pytest.mark.full) for value in tuples]
