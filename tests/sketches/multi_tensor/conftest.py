import pytest

from hf_sketch.sketches import by_name
from hf_sketch.sketches.multi_tensor import division


@pytest.fixture
def shorter_blocks(monkeypatch):
    """Blocks of 2**12 elements, of which Triton's interpreter adds up fewer numbers.

    So few programs add them up that each has several units.
    """
    monkeypatch.setattr(by_name, "_BLOCK_SIZE", 2**12)
    monkeypatch.setattr(division, "_LONG_PROGRAMS", 2)
