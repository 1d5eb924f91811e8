"""The kernels for CUDA give the sums of the plain path, run on the CPU if need be."""

import pytest
import torch

from hf_sketch import AFFD, AFJL, FJL, SRHT
from hf_sketch.sketches.transforms import fused
from hf_sketch.sketches.transforms.fused import accumulate_fused, can_fuse

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative to the largest number: the matrix units of a CUDA device cut sums off.
PRECISION = {"cpu": 1e-6, "cuda": 1e-5}

# Operators, and the block that their input starts with.
CASES = [
    (SRHT(5000, 1024, seed=0, block_size=1024), 0),
    (SRHT(5000, 700, seed=3, block_size=1024, stream="w"), 2),
    (SRHT(1, 1, seed=0, block_size=1024), 0),
    (SRHT(5000, 2048, seed=0, block_size=2048), 1),
    (SRHT(9000, 4096, seed=0, block_size=4096), 0),
    (SRHT(7000, 3000, seed=3, block_size=1024, stream="w"), 1),
    (SRHT(13000, 10000, seed=0, block_size=4096), 3),
    (SRHT(50, 1, seed=0, block_size=1), 1),
    (SRHT(3000, 64, seed=0, block_size=64), 5),
    (SRHT(3000, 200, seed=3, block_size=256, stream="w"), 7),
    (AFFD(3000, 64, seed=3, block_size=1024, stream="w"), 0),
    (AFFD(3000, 256, seed=0, block_size=256), 3),
    (AFJL(5000, 900, seed=0, block_size=1024), 0),
    (AFJL(3000, 100, seed=3, block_size=256, stream="w"), 3),
    (FJL(5000, 64, seed=0, block_size=1024), 0),
    # Over the end of a run of signs, and past what 32 bits number.
    (SRHT(3000, 1024, seed=0, block_size=1024), 2**8 - 1),
    (SRHT(3000, 256, seed=3, block_size=256, stream="w"), 2**10 - 1),
    (SRHT(3000, 2048, seed=0, block_size=1024), 2**22 - 1),
]
LONG_CASES = [
    (AFFD(20000, 64, seed=0, block_size=2**13), 1),
    (AFFD(20000, 64, seed=3, block_size=2**13, stream="w"), 2**5 - 2),
    (SRHT(2**15 - 5, 2**14 + 5, seed=0, block_size=2**15), 1),
    (FJL(2**15 - 5, 64, seed=0, block_size=2**15), 2**17),
    (AFJL(2**16 - 5, 64, seed=0, block_size=2**16), 0),
    (SRHT(2**16 - 5, 2**15 + 5, seed=3, block_size=2**16, stream="w"), 3),
]
LONGEST = AFJL(2**18 - 5, 100, seed=0, block_size=2**18), 1


def each(cases):
    """Parametrise by operators and first blocks."""
    names = [f"{operator} from {first}" for operator, first in cases]
    return pytest.mark.parametrize(("operator", "first"), cases, ids=names)


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def on_device(operator, rows, first):
    return accumulate_fused(operator, rows.to(DEVICE), first).cpu()


def assert_close(got, expected, precision):
    atol = precision * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def assert_sums_are_plain(operator, rows, first):
    """The kernels' sums in float32 are those of the plain path in float64."""
    got = on_device(operator, rows, first)
    assert got.dtype == torch.float32
    expected = operator.accumulate(rows.cpu().double(), first)
    assert_close(got.double(), expected, PRECISION[DEVICE])


@each(CASES)
def test_short_blocks_add_up_to_the_plain_sum(operator, first):
    assert_sums_are_plain(operator, normal(2, operator.in_size), first)


@each([*LONG_CASES, LONGEST])
def test_long_blocks_add_up_to_the_plain_sum(operator, first):
    assert_sums_are_plain(operator, normal(1, operator.in_size), first)


@each([*CASES, *LONG_CASES[1:3]])
def test_signs_and_segments_are_the_same_bits(operator, first):
    """Small integers: no sum is rounded, and one wrong sign shows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(1, 9, (1, operator.in_size), generator=generator).float()
    expected = operator.accumulate(rows, first)
    assert torch.equal(on_device(operator, rows, first), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@each([(SRHT(2500, 2000, 0, 1024), 0), (AFFD(2500, 9, 0, 2**13), 0)])
def test_half_precision_is_read_as_it_is(operator, first, dtype):
    assert_sums_are_plain(operator, normal(1, 2500).to(dtype), first)


@each([(SRHT(2500, 2000, 0, 1024), 0), (AFFD(2500, 9, 0, 2**13), 0)])
def test_rows_may_lie_apart(operator, first):
    rows = normal(3, 2600).to(DEVICE)[::2, 30:2530]
    assert_sums_are_plain(operator, rows, first)


def test_long_blocks_may_take_several_chunks(monkeypatch):
    """Two rows at a time in chunks of one unit, then one row in one of two."""
    monkeypatch.setattr(fused, "_CHUNK_ELEMENTS", 2**16)
    operator = AFFD(2**15 + 5, 64, seed=0, block_size=2**15)
    assert_sums_are_plain(operator, normal(3, operator.in_size), 0)


class OnCuda(torch.Tensor):
    """A tensor that says that it lies on a CUDA device."""

    is_cuda = True


@pytest.fixture
def capability(monkeypatch):
    """Sets what a CUDA device, present or not, says of itself."""

    def set_to(*version):
        name = "get_device_capability"
        monkeypatch.setattr(torch.cuda, name, lambda device: version)

    set_to(8, 0)
    return set_to


@pytest.mark.usefixtures("capability")
@each([*CASES, *LONG_CASES, LONGEST])
def test_these_operators_are_fused_on_a_cuda_device_alone(operator, first):
    rows = torch.zeros(1, 10)
    assert can_fuse(operator, rows.as_subclass(OnCuda))
    assert not can_fuse(operator, rows)


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize(
    "operator",
    [
        SRHT(5000, 64, seed=0),
        AFFD(5000, 64, seed=0, block_size=1024, mix="fft"),
        AFFD(5000, 64, seed=0, block_size=1024, mix="kronecker"),
        SRHT(5000, 1024, seed=0, block_size=512),
        SRHT(5000, 2**14, seed=0, block_size=2**13),
        SRHT(5000, 64, seed=0, block_size=2**19),
    ],
    ids=repr,
)
def test_other_operators_are_not_fused(operator):
    assert not can_fuse(operator, torch.zeros(1, 10).as_subclass(OnCuda))


@pytest.mark.parametrize(
    "rows",
    [torch.zeros(2, 10).double(), torch.zeros(10, 2).T, torch.zeros(2, 0)],
    ids=["float64", "columns", "empty"],
)
@pytest.mark.usefixtures("capability")
def test_other_rows_are_not_fused(rows):
    assert not can_fuse(CASES[0][0], rows.as_subclass(OnCuda))


def test_a_device_without_products_in_bfloat16_is_not_used(capability):
    capability(7, 5)
    assert not can_fuse(CASES[0][0], torch.zeros(1, 10).as_subclass(OnCuda))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@each([*CASES, *LONG_CASES, LONGEST])
def test_a_cuda_device_gives_the_sketch_of_the_cpu(operator, first):
    x = normal(operator.in_size)
    assert_close((operator @ x.cuda()).cpu(), operator @ x, PRECISION["cuda"])
