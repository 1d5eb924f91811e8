"""Dense matrices of the operators, built from the paper's formulas in float64."""

import math

import torch

from hf_sketch import CounterRandom


def hadamard(size):
    """Entry (i, j) is (-1)^<bits of i, bits of j>, divided by sqrt(size)."""
    index = torch.arange(size)
    common = index.unsqueeze(0) & index.unsqueeze(1)
    odd = sum((common >> bit) & 1 for bit in range(20)) % 2
    return (1.0 - 2.0 * odd.double()) / math.sqrt(size)


def kronecker(factors):
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor in factors:
        product = torch.kron(product, factor)
    return product


def sizes_of(size):
    """Factors of at most 64, the odd one first."""
    full, odd = divmod(size.bit_length() - 1, 6)
    return ([2**odd] if odd or not full else []) + [64] * full


def dense_affd(operator):
    """Eq. (6) on each block, side by side; zero columns of the padding left out."""
    size = operator.block_size or 1 << (operator.in_size - 1).bit_length()

    def transform(role, permute):
        return kronecker(
            permute(hadamard(n), CounterRandom(operator.seed, f"affd-{role}/{i}"))
            for i, n in enumerate(sizes_of(size))
        )

    h1 = transform("rows", lambda h, rng: h[rng.permutation(len(h))])
    h2 = transform("columns", lambda h, rng: h[:, rng.permutation(len(h))])
    gaussian = CounterRandom(operator.seed, "affd-gaussian").normals(0, size)
    words = CounterRandom(operator.seed, f"affd-signs/{operator.stream}")
    blocks = []
    for block in range(math.ceil(operator.in_size / size)):
        group, place = divmod(block, 16)
        word = words.words(group * size, size)
        signs = 1.0 - 2.0 * ((word >> (31 - 2 * place)) & 1).double()
        flips = 1.0 - 2.0 * ((word >> (30 - 2 * place)) & 1).double()
        diagonal = gaussian.abs().double() * flips
        blocks.append(h2 @ (diagonal.unsqueeze(1) * h1) * signs)
    scale = math.sqrt(size / operator.out_size)
    return scale * torch.cat(blocks, 1)[: operator.out_size, : operator.in_size]


def dense_qk(operator, in_factors, out_factors):
    """Eq. (8) with the factors given, cut to the operator's sizes."""

    def rotation(axis, b, d):
        rng = CounterRandom(operator.seed, f"qk/{axis}/{operator.stream}")
        gaussian = rng.normals(0, b * d).double().view(b, d)
        q, r = torch.linalg.qr(gaussian)
        return (q * r.diagonal().sign()).float().double().T

    factors = [
        rotation(axis, b, d)
        for axis, (b, d) in enumerate(zip(in_factors, out_factors, strict=True))
    ]
    scale = math.sqrt(math.prod(in_factors) / math.prod(out_factors))
    return scale * kronecker(factors)[: operator.out_size, : operator.in_size]
