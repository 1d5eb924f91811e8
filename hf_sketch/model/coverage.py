"""What a sketch of a model covers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Coverage:
    """What a ModelSketch covers.

    Args:
        parameters: names of the parameters that are sketched.
        elements: how many numbers they hold.
        frozen: names of the parameters left out because they do not train.
    """

    parameters: tuple[str, ...]
    elements: int
    frozen: tuple[str, ...]
