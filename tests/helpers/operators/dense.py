"""Dense matrices of the operators, built from the paper's formulas in float64.

Only the random numbers are the operators' own; the algebra is not.
"""

import math

import torch

from hf_sketch import CounterRandom
from hf_sketch.sketches.transforms.signs import RUN, StreamSigns, sign_masks


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
    """Factors of at most 32, the odd one first."""
    full, odd = divmod(size.bit_length() - 1, 5)
    return ([2**odd] if odd or not full else []) + [32] * full


def rotation(seed, role, b, d):
    gaussian = CounterRandom(seed, role).normals(0, b * d).double().view(b, d)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float().double().T


def transform(operator, size, permuted):
    """H1 ("rows"), H2 ("columns") or H ("none") of the operator's kind, orthogonal."""
    mix = getattr(operator, "mix", "hadamard")
    if mix == "fft":
        angle = torch.outer(torch.arange(size), torch.arange(size)) % size
        angle = angle.double() * (2 * math.pi / size)
        matrix = (angle.cos() - angle.sin()) / math.sqrt(size)
        kinds = {"AFFD": "columns", "AFJL": "rows"}
        if kinds.get(type(operator).__name__) != permuted:
            return matrix
        first = CounterRandom(operator.seed, f"first-row-{permuted}").words(0, 1)
        return matrix.roll(-(int(first) % size), 0)
    if mix == "kronecker":
        return kronecker(
            rotation(operator.seed, f"rotation-{permuted}/{axis}", n, n)
            for axis, n in enumerate(sizes_of(size))
        )
    factors = []
    for axis, n in enumerate(sizes_of(size)):
        order = CounterRandom(operator.seed, f"{permuted}/{axis}").permutation(n)
        h = hadamard(n)
        if permuted != "none":
            h = h[order] if permuted == "rows" else h[:, order]
        factors.append(h)
    return kronecker(factors)


def signs(operator, role, block, size):
    """The +-1 signs of one block, as documented for a stream or for one block."""
    if operator.block_size is None:
        rng = CounterRandom(operator.seed, f"fresh-{role}/{operator.stream}")
        masks = sign_masks(rng, 0, size)
    else:
        run = max(RUN, size)
        stream = StreamSigns(operator.seed, role, operator.stream, run)
        number, place = divmod(block * size, run)
        (offset,) = stream.offsets(number, 1)
        masks = stream.masks(offset, place, size, torch.device("cpu"))
    return torch.where(masks < 0, -1.0, 1.0).double()


def block_of(operator):
    return operator.block_size or 1 << (operator.in_size - 1).bit_length()


def blocks_of(operator, one_block):
    """The matrices of all blocks side by side, cut to the operator's sizes."""
    count = math.ceil(operator.in_size / block_of(operator))
    matrices = [one_block(block) for block in range(count)]
    return torch.cat(matrices, 1)[: operator.out_size, : operator.in_size]


def before(operator, block):
    if getattr(operator, "mix", "hadamard") == "kronecker":
        return torch.ones(block_of(operator)).double()
    return signs(operator, "before", block, block_of(operator))


def gaussian(operator, block):
    """G of a block: shared magnitudes, the block's own signs."""
    n = block_of(operator)
    magnitude = CounterRandom(operator.seed, "gaussian").normals(0, n).abs().double()
    return magnitude * signs(operator, "after", block, n)


def dense_affd(operator):
    """Eq. (6): sqrt(N/D) R H2 G H1 B."""
    n = block_of(operator)
    h1, h2 = transform(operator, n, "rows"), transform(operator, n, "columns")
    scale = math.sqrt(n / operator.out_size)

    def one_block(block):
        return (
            scale
            * h2
            @ (gaussian(operator, block)[:, None] * h1)
            * before(operator, block)
        )

    return blocks_of(operator, one_block)


def dense_afjl(operator):
    """Eq. (7): sqrt(N/D) R G H1 B."""
    n = block_of(operator)
    h1 = transform(operator, n, "rows")
    scale = math.sqrt(n / operator.out_size)

    def one_block(block):
        g = gaussian(operator, block)
        return scale * g[:, None] * h1 * before(operator, block)

    return blocks_of(operator, one_block)


def dense_fjl(operator):
    """Eq. (2): sqrt(N/D) G_s H B, with the signs of each block after H."""
    n, d, m = block_of(operator), operator.out_size, operator.samples
    sparse = torch.zeros(d, n, dtype=torch.float64)
    places = CounterRandom(operator.seed, "sparse-places").words(0, d * m) & (n - 1)
    weights = CounterRandom(operator.seed, "sparse-weights").normals(0, d * m)
    for entry in range(d * m):
        sparse[entry // m, places[entry]] += weights[entry].double() / math.sqrt(m)
    h = transform(operator, n, "none")

    def one_block(block):
        after = signs(operator, "after", block, n)
        signed = after[:, None] * h * before(operator, block)
        return math.sqrt(n / d) * sparse @ signed

    return blocks_of(operator, one_block)


def dense_srht(operator):
    """Signs, orthogonal transform, signs; blocks added to their segments."""
    n, d = block_of(operator), operator.out_size
    h = transform(operator, n, "rows")
    segments = max(1, math.ceil(d / n))
    words = CounterRandom(operator.seed, f"segments/{operator.stream}")

    def one_block(block):
        rotated = (
            signs(operator, "after", block, n)[:, None] * h * before(operator, block)
        )
        whole = torch.zeros(segments * n, n, dtype=torch.float64)
        word = int(words.words(block, 1)) % 2**32
        low = word * segments // 2**32 * n
        whole[low : low + n] = rotated
        return math.sqrt(segments * n / d) * whole

    return blocks_of(operator, one_block)


def dense_ffd(operator):
    """Eq. (12): sum over blocks of B H P G H, all of the sketch's (padded) length."""
    n = 1 << (operator.out_size - 1).bit_length()
    h, stream, seed = hadamard(n), operator.stream, operator.seed
    matrices = []
    for block in range(math.ceil(operator.in_size / n)):
        g = CounterRandom(seed, f"ffd-gaussian/{stream}").normals(block * n, n)
        order = CounterRandom(seed, f"ffd-order/{stream}/{block}").permutation(n)
        rng = CounterRandom(seed, f"ffd-signs/{stream}")
        b = torch.where(sign_masks(rng, block * n, n) < 0, -1.0, 1.0).double()
        permutation = torch.eye(n, dtype=torch.float64)[order]
        matrices.append(b[:, None] * h @ permutation @ (g.double()[:, None] * h))
    scale = math.sqrt(n / operator.out_size)
    return scale * torch.cat(matrices, 1)[: operator.out_size, : operator.in_size]


def dense_dense(operator):
    """Independent normal entries of variance 1/D, column by column."""
    d, n = operator.out_size, operator.in_size
    rng = CounterRandom(operator.seed, f"dense/{operator.stream}")
    return rng.normals(0, n * d).double().view(n, d).T / math.sqrt(d)


def folding(seed, role, size, kept):
    """Coordinate j adds to j mod `kept` with a random sign: (kept, size)."""
    words = CounterRandom(seed, role).words(0, size).tolist()
    matrix = torch.zeros(kept, size, dtype=torch.float64)
    for place, word in enumerate(words):
        matrix[place % kept, place] = (-1) ** (word % 2) * math.sqrt(kept / size)
    return matrix


def dense_qk(operator, in_factors, out_factors):
    """Eq. (8) with the factors given, cut to the operator's sizes."""
    factor = folding if operator.rotation == "signs" else rotation
    factors = [
        factor(operator.seed, f"qk/{axis}/{operator.stream}", b, d)
        for axis, (b, d) in enumerate(zip(in_factors, out_factors, strict=True))
    ]
    scale = math.sqrt(math.prod(in_factors) / math.prod(out_factors))
    return scale * kronecker(factors)[: operator.out_size, : operator.in_size]


def dense_grouped(operator):
    """From the definition, one coordinate of each side at a time."""
    *experts, m, n = operator.sides
    experts, out = (experts or [1])[0], operator.out_size
    longest = 2 ** (out - 1).bit_length()
    groups = operator.widths[0] * operator.widths[1] // longest
    sizes = longest // operator.widths[1], longest // operator.widths[0]
    kept = out // (sizes[0] * sizes[1])
    turned = []
    for side, (length, size) in enumerate(zip((m, n), sizes, strict=True)):
        role = f"groups/{side}/{operator.stream}"
        order = CounterRandom(operator.seed, role).permutation(groups)
        rows = hadamard(groups)[order][:kept] * math.sqrt(groups)
        role = f"sides/{side}/{operator.stream}"
        words = CounterRandom(operator.seed, role).words(0, experts * length)
        signs = (1.0 - 2.0 * (words & 1)).view(experts, length)
        turned.append(torch.zeros(experts, kept, size, length, dtype=torch.float64))
        for j in range(length):
            c, p = divmod(j % operator.widths[side], size)
            turned[side][:, :, p, j] = signs[:, None, j] * rows[:, c]
    matrix = torch.einsum("ekpi,ekqj->kpqeij", *turned).reshape(-1, operator.in_size)
    empty = out - len(matrix)
    return torch.nn.functional.pad(matrix / math.sqrt(kept), (0, 0, 0, empty))
