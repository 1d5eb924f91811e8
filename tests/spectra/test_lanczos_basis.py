import torch

from hf_sketch import lanczos
from tests.helpers.operators.symmetric import Diagonal


def test_vectors_of_a_million_float32_numbers_have_unit_norm():
    operator = Diagonal(torch.linspace(-1, 3, 2**20))
    result = lanczos(operator, 10, progress=False)
    rows = result.basis.rows.double()
    # A float32 sum of 2**20 squares, as vector_norm takes it, is off by 2e-5.
    error = (rows.square().sum(1) - 1).abs().max()
    assert error < 1e-6
    assert error - 1e-7 < result.loss_of_orthogonality < 2e-6
