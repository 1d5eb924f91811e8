import pytest

from hf_sketch.sketches import blocked


@pytest.fixture
def short_sign_tables(monkeypatch):
    """Runs of signs as short as the inputs: a draw of an operator takes a millisecond.

    Within a run all signs are independent, so that statistics stay what they are.
    """
    monkeypatch.setattr(blocked, "RUN", 2**12)
