"""What CUDA refuses is refused on the simulated GPU, and what reads bytes gets zeros and a note."""

import copy
import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mezzotint.errors import GhostError
from mezzotint.ghost.refusals import REFUSALS
from mezzotint.ghost.session import ghost_gpu

LINALG: dict[str, Callable[[Tensor], Any]] = {
    "qr": torch.linalg.qr,
    "cholesky": torch.linalg.cholesky,
    "svd": torch.linalg.svd,
    "eigh": torch.linalg.eigh,
    "eig": torch.linalg.eig,
    "lu": torch.linalg.lu,
    "lu_factor": torch.linalg.lu_factor,
    "det": torch.linalg.det,
    "solve": lambda x: torch.linalg.solve(x, x),
    "inv": torch.linalg.inv,
    "solve_triangular": lambda x: torch.linalg.solve_triangular(x, x, upper=True),
    "householder_product": lambda x: torch.linalg.householder_product(x, x[0]),
}


def test_linear_algebra_has_no_low_precision() -> None:
    with ghost_gpu("H100"):
        x = torch.randn(8, 8, device="cuda")
        for call in (*LINALG.values(), torch.pdist, lambda x: torch.cdist(x, x)):
            call(x)
            for dtype in (torch.float16, torch.bfloat16):
                with pytest.raises(RuntimeError, match=r"not implemented for|Low precision dtypes not supported"):
                    call(x.to(dtype))


@pytest.mark.parametrize("name", LINALG)
def test_documentation_of_torch_agrees(name: str) -> None:
    assert "float, double, cfloat and cdouble" in getattr(torch.linalg, name).__doc__


def test_cdist_of_many_rows_is_a_matmul() -> None:
    with ghost_gpu("H100"):
        x = torch.randn(40, 8, device="cuda", dtype=torch.bfloat16)
        assert torch.cdist(x, x).dtype is torch.bfloat16
        with pytest.raises(NotImplementedError, match="cdist_cuda"):
            torch.cdist(x, x, p=1.0)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_half_transforms_take_powers_of_two() -> None:
    with ghost_gpu("T4"):
        for transform in (torch.fft.fft, torch.fft.rfft, torch.fft.fft2):
            transform(torch.randn(4, 64, device="cuda").half())
            for size in (7, 100):
                x = torch.randn(4, size, device="cuda")
                transform(x)
                with pytest.raises(RuntimeError, match="powers of two"):
                    transform(x.half())


def test_matmul_refuses_other_dtypes() -> None:
    with ghost_gpu("H100"):
        for dtype in (torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn):
            x = torch.ones(4, 4, device="cuda").to(dtype)
            with pytest.raises(NotImplementedError, match="addmm_cuda"):
                torch.mm(x, x)


def test_matmul_refuses_two_dtypes() -> None:
    with ghost_gpu("H100"):
        x = torch.ones(4, 4, device="cuda")
        with pytest.raises(RuntimeError, match="same dtype"):
            x @ x.half()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            assert (x @ x.half()).dtype is torch.bfloat16


def test_every_row_states_its_source() -> None:
    assert all(row.source and row.dtypes for row in REFUSALS.values())


def _save_file(x: Tensor, path: Path) -> Any:
    from safetensors.torch import load_file, save_file

    save_file({"x": x, "y": x.clone()}, path / "x.safetensors")
    assert not load_file(path / "x.safetensors")["x"].any()


READERS: dict[str, Callable[[Tensor, Path], Any]] = {
    "safetensors": _save_file,
    "data_ptr": lambda x, _: x[1].data_ptr() - x.data_ptr() == x.stride(0) * x.element_size() or pytest.fail("stride"),
    "numpy": lambda x, _: x.cpu().numpy().sum(),
    "asarray": lambda x, _: np.asarray(x.cpu()).sum(),
    "from_dlpack": lambda x, _: (not np.from_dlpack(x.cpu()).any()) or pytest.fail("no zeros"),
    "md5": lambda x, _: hashlib.md5(x.cpu().numpy().tobytes()).hexdigest(),
    "tolist": lambda x, _: x.tolist(),
    "pickle": lambda x, _: pickle.loads(pickle.dumps(x)).shape == x.shape or pytest.fail("shape"),
    "torch.save": lambda x, path: torch.save({"x": x}, path / "x.pt"),
    "np.save": lambda x, path: np.save(path / "x.npy", x.cpu()),
    "share_memory_": lambda x, _: x.cpu().share_memory_(),
    "deepcopy": lambda x, _: copy.deepcopy(x),
    "copy_": lambda x, _: torch.zeros(x.shape).copy_(x),
    "str": lambda x, _: str(x),
    "allclose": lambda x, _: torch.allclose(x, x),
}
SILENT = {"copy_", "deepcopy", "str", "torch.save"}


@pytest.mark.parametrize("kind", ["cpu", "cuda:0"])
@pytest.mark.filterwarnings("ignore")
def test_reading_bytes_gives_zeros_and_a_note(kind: str, tmp_path: Path) -> None:
    with ghost_gpu("A100") as gpu:
        for name, read in READERS.items():
            before = sum(gpu.assumed.values())
            read(torch.randn(100, 100, device=kind), tmp_path)
            assert name in SILENT or sum(gpu.assumed.values()) > before, name
    assert torch.ones(3).data_ptr()


def test_one_object_can_be_entered_again() -> None:
    gpu = ghost_gpu("H100")
    found = []
    for _ in range(3):
        with gpu:
            x = torch.randn(256, 256, device="cuda")
            (x @ x).sum().item()
            with pytest.raises(GhostError, match="already"), gpu:
                pass
            assert torch.cuda.is_available()
        found.append((gpu.peak_allocated, gpu.assumed, tuple(gpu.notes)))
        del x
    assert found[0] == found[1] == found[2]
