"""Symmetric operators with spectra that are known."""

from dataclasses import dataclass
from functools import cache

import torch

from hf_sketch import CounterRandom


@dataclass
class Matrix:
    """A dense matrix that counts its products, and spoils one if asked to."""

    matrix: torch.Tensor
    products: int = 0
    spoilt_product: int = 0
    spoil: object = None

    @property
    def size(self):
        return len(self.matrix)

    @property
    def dtype(self):
        return self.matrix.dtype

    @property
    def device(self):
        return self.matrix.device

    def __matmul__(self, v):
        assert v.shape == (self.size,)
        assert v.dtype == self.dtype
        self.products += 1
        result = self.matrix @ v
        if self.products == self.spoilt_product:
            return self.spoil(result)
        return result


@dataclass
class Diagonal:
    """A diagonal matrix: its eigenvalues are its elements."""

    elements: torch.Tensor

    @property
    def size(self):
        return len(self.elements)

    @property
    def dtype(self):
        return self.elements.dtype

    @property
    def device(self):
        return self.elements.device

    def __matmul__(self, v):
        return self.elements * v


@cache
def _drawn(count, seed):
    return CounterRandom(seed, "test").normals(0, count).double()


def normals(*shape, seed=0):
    return _drawn(torch.Size(shape).numel(), seed).clone().view(shape)


@cache
def _orthogonal(size, seed):
    return torch.linalg.qr(normals(size, size, seed=seed)).Q


def with_eigenvalues(eigenvalues, seed=0):
    """A dense matrix with these eigenvalues and random eigenvectors, as columns."""
    eigenvalues = torch.as_tensor(eigenvalues, dtype=torch.float64)
    size = len(eigenvalues)
    vectors = _orthogonal(size, seed).clone()
    matrix = (vectors * eigenvalues) @ vectors.T
    return (matrix + matrix.T) / 2, vectors


def goe(size, seed=0):
    """A matrix of the Gaussian orthogonal ensemble, whose spectrum fills [-1, 1]."""
    x = normals(size, size, seed=seed)
    return (x + x.T) / (8 * size) ** 0.5
