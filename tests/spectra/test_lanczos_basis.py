"""The basis of a Lanczos run, in memory or in a file, a chunk at a time."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hf_sketch.spectra.basis as lanczos_basis
from hf_sketch import lanczos
from tests.helpers.lanczos_runs import SIZE, assert_same_bits, run
from tests.helpers.operators.symmetric import Diagonal, Matrix, goe


def test_vectors_of_a_million_float32_numbers_have_unit_norm():
    operator = Diagonal(torch.linspace(-1, 3, 2**20))
    result = lanczos(operator, 10, progress=False)
    rows = result.basis.rows.double()
    # A float32 sum of 2**20 squares, as vector_norm takes it, is off by 2e-5.
    error = (rows.square().sum(1) - 1).abs().max()
    assert error < 1e-6
    assert error - 1e-7 < result.loss_of_orthogonality < 2e-6


@pytest.mark.parametrize(
    ("dtype", "bound", "decades"),
    [(torch.float64, 1e-12, 8), (torch.float32, 1e-5, 4)],
)
@pytest.mark.parametrize("basis_file", [False, True])
def test_the_basis_stays_orthogonal(
    dtype, bound, decades, basis_file, tmp_path, monkeypatch
):
    bulk = torch.linspace(1, 2, 980).double()
    eigenvalues = torch.cat([bulk, torch.logspace(0.5, decades, 20)]).to(dtype)
    monkeypatch.setattr(lanczos_basis, "CHUNK_ELEMENTS", 64 * 1000)
    file = tmp_path / "basis" if basis_file else None
    result = run(Diagonal(eigenvalues), 300, basis_file=file)
    rows = result.basis.rows.double()
    loss = float((rows @ rows.T - torch.eye(300)).abs().max())
    assert result.steps == 300
    assert loss < bound
    assert result.loss_of_orthogonality < bound
    tolerance = 30 * torch.finfo(dtype).eps
    assert result.loss_of_orthogonality == pytest.approx(loss, abs=tolerance)


@pytest.mark.parametrize("chunk_rows", [1, 3, 10])
def test_a_loss_of_orthogonality_is_seen_in_any_chunk(chunk_rows, monkeypatch):
    monkeypatch.setattr(lanczos_basis, "CHUNK_ELEMENTS", chunk_rows * SIZE)
    basis = run(Matrix(goe(SIZE)), 10).basis
    assert basis.loss_of_orthogonality() < 1e-13
    basis.rows[1] += 0.01 * basis.rows[7]
    basis.rows[4] *= 1.001
    assert basis.loss_of_orthogonality() == pytest.approx(0.01)
    basis.rows[4] *= 2
    assert basis.loss_of_orthogonality() == pytest.approx(2.002**2 - 1)


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
def test_results_do_not_depend_on_the_chunks(chunk_rows, monkeypatch):
    operator = Matrix(goe(SIZE))
    whole = run(operator, 50)
    monkeypatch.setattr(lanczos_basis, "CHUNK_ELEMENTS", chunk_rows * SIZE)
    parts = run(operator, 50)
    assert (whole.eigenvalues - parts.eigenvalues).abs().max() < 1e-10
    overlaps = whole.ritz_vectors([0, -1]) @ parts.ritz_vectors([0, -1]).T
    torch.testing.assert_close(overlaps, overlaps.new_tensor([1, 1]).sign().diag())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_basis_in_a_file_gives_the_same_bits(dtype, tmp_path, monkeypatch):
    operator = Matrix(goe(SIZE).to(dtype))
    monkeypatch.setattr(lanczos_basis, "CHUNK_ELEMENTS", 7 * SIZE)
    memory = run(operator, 60)
    file = run(operator, 60, basis_file=tmp_path / "basis")
    assert_same_bits(memory, file)
    assert torch.equal(memory.ritz_vectors([3, -1]), file.ritz_vectors([3, -1]))
    written = torch.from_file(str(tmp_path / "basis"), size=60 * SIZE, dtype=dtype)
    assert torch.equal(written.view(60, SIZE), memory.basis.rows)


def test_a_new_run_in_the_same_file_leaves_the_old_result_alone(tmp_path):
    first = run(Matrix(goe(SIZE)), 10, basis_file=tmp_path / "basis")
    rows = first.basis.rows.clone()
    run(Matrix(goe(SIZE, seed=1)), 12, basis_file=str(tmp_path / "basis"))
    assert torch.equal(first.basis.rows, rows)


def test_a_full_disk_is_reported_before_the_run(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(lanczos_basis.shutil, "disk_usage", lambda path: usage)
    operator = Matrix(goe(SIZE))
    with pytest.raises(OSError, match=r"room for 9600 bytes, got 1000 free.*fewer"):
        run(operator, 10, basis_file=tmp_path / "basis")
    assert operator.products == 0


class Operations(TorchDispatchMode):
    """Notes the names of operations, and the sizes of the storages they made."""

    def __init__(self):
        super().__init__()
        self.names = set()
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.add(function.overloadpacket.__name__)
        if isinstance(result, torch.Tensor):
            storage = result.untyped_storage()
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return result


def test_nothing_but_the_basis_is_of_its_size(monkeypatch):
    size, steps = 2**14, 40
    monkeypatch.setattr(lanczos_basis, "CHUNK_ELEMENTS", 9 * size)
    with Operations() as operations:
        result = run(Diagonal(torch.linspace(0, 1, size)), steps)
        result.ritz_vectors([-1])
        assert result.loss_of_orthogonality < 1e-5
    largest = sorted(operations.sizes.values())[-2:]
    # The start vector's float64 words are the next in size: 2 * 8 bytes an element.
    assert largest == [pytest.approx(16 * size, rel=0.01), steps * size * 4]


def test_no_product_is_of_two_matrices_which_a_gpu_may_round():
    with Operations() as operations:
        result = run(Diagonal(torch.linspace(0, 1, SIZE)), 10)
        result.ritz_vectors([-2, -1])
        assert result.loss_of_orthogonality < 1e-5
    assert {"mv", "addmv_"} <= operations.names
    assert not {"mm", "addmm", "addmm_", "bmm", "baddbmm"} & operations.names
