"""Random rotations."""

import torch
from torch import Tensor

from hf_sketch.sketches.transforms.random import CounterRandom


def haar_columns(size: int, count: int, rng: CounterRandom) -> Tensor:
    """Orthonormal columns with the Haar distribution.

    The columns of a QR decomposition get the signs of R's diagonal, which makes it Haar
    up to the sign of the determinant; no inner product sees that one.

    Shapes:
        returns (size, count), float32, on the CPU; count <= size
    """
    gaussian = rng.normals(0, size * count).to(torch.float64).view(size, count)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).to(torch.float32)
