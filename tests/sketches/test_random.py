import pytest
import torch

from hf_sketch import CounterRandom
from hf_sketch.sketches.transforms.random import ascending_order

COUNT = 2**17


@pytest.fixture
def words():
    return CounterRandom(0, "test").words(0, COUNT)


def bits(words):
    return (words.unsqueeze(1) >> torch.arange(32)) & 1


def assert_uncorrelated(left, right):
    # The mean of COUNT products of fair signs has standard deviation COUNT**-0.5.
    signs = (1.0 - 2.0 * bits(left)) * (1.0 - 2.0 * bits(right))
    assert signs.mean(0).abs().max() < 6 * COUNT**-0.5


def test_words_are_pinned():
    first = CounterRandom(0, "test").words(0, 4).tolist()
    assert first == [1410445078, -1610264395, 1818823827, 432858102]
    across = CounterRandom(5, "other").words(2**32 - 2, 4).tolist()
    assert across == [-549877887, -853017706, -1504456661, -1756754940]


def test_any_slice_can_be_drawn_alone(words):
    rng = CounterRandom(0, "test")
    assert torch.equal(rng.words(1000, 17), words[1000:1017])
    assert torch.equal(rng.normals(1000, 17), rng.normals(0, 1017)[1000:])


def test_slices_agree_across_the_32_bit_boundary():
    rng, edge = CounterRandom(3, "edge"), 2**32
    across = rng.words(edge - 5, 10)
    assert torch.equal(across[:5], rng.words(edge - 5, 5))
    assert torch.equal(across[5:], rng.words(edge, 5))
    assert not torch.equal(across[5:], rng.words(0, 5))


def test_every_bit_is_fair(words):
    assert (bits(words).double().mean(0) - 0.5).abs().max() < 6 * 0.5 * COUNT**-0.5


@pytest.mark.parametrize("shift", range(1, 32))
def test_bits_of_a_word_are_independent(words, shift):
    rotated = (words << shift) | ((words >> (32 - shift)) & ((1 << shift) - 1))
    assert_uncorrelated(words, rotated)


def test_neighboring_indices_are_independent(words):
    assert_uncorrelated(words[1:], words[:-1])
    assert_uncorrelated(words[2**16 :], words[: -(2**16)])


def test_seeds_and_roles_are_independent(words):
    assert_uncorrelated(words, CounterRandom(1, "test").words(0, COUNT))
    assert_uncorrelated(words, CounterRandom(0, "tesu").words(0, COUNT))


def test_blocks_of_high_indices_are_independent(words):
    assert_uncorrelated(words, CounterRandom(0, "test").words(2**32, COUNT))


def test_normals_have_the_moments_of_a_gaussian():
    x = CounterRandom(0, "test").normals(0, COUNT).double()
    # Standard deviations of the sample means of x, x^2, x^3, x^4: sqrt(1, 2, 15, 96).
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(power).mean() - mean) < 6 * (variance / COUNT) ** 0.5


def test_normals_have_the_tails_of_a_gaussian():
    x = CounterRandom(0, "test").normals(0, COUNT).double()
    for bound in (1.0, 2.0, 3.0, 4.0):
        expected = float(torch.erfc(torch.tensor(bound / 2**0.5, dtype=torch.float64)))
        tolerance = 6 * (expected / COUNT) ** 0.5
        assert abs((x.abs() > bound).double().mean() - expected) < tolerance


def test_a_permutation_is_one():
    order = CounterRandom(0, "test").permutation(1000)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert not torch.equal(order, CounterRandom(1, "test").permutation(1000))


@pytest.mark.usefixtures("no_generator_use")
def test_the_global_generator_is_not_touched():
    rng = CounterRandom(0, "test")
    rng.words(0, 10)
    rng.normals(0, 10)
    rng.permutation(10)


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 1025])
def test_the_ascending_order_is_the_stable_one(size):
    words = CounterRandom(0, "ties").words(0, 3 * size).view(3, size)
    words = words % 7 - 3 if size % 2 else words  # with ties and signs
    assert torch.equal(ascending_order(words), words.argsort(dim=1, stable=True))


def test_normals_do_not_depend_on_the_slice_they_are_drawn_in():
    rng = CounterRandom(0, "normals")
    whole = rng.normals(0, 50_000)
    assert torch.equal(whole[123:40_000], rng.normals(123, 40_000 - 123))
