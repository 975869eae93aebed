"""The public surface is what `__all__` says, and importing it does not load torch."""

import subprocess
import sys
from pathlib import Path

import pytest

import mezzotint as mz


def test_all_is_sorted_and_true() -> None:
    assert list(mz.__all__) == sorted(mz.__all__)
    assert set(dir(mz)) == set(mz.__all__)
    for name in mz.__all__:
        assert getattr(mz, name).__module__.startswith("mezzotint")


def test_unknown_names_raise_the_usual_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mz.nothing  # noqa: B018


@pytest.mark.parametrize(
    "module",
    [
        "mezzotint",
        "mezzotint.policy.grammar",
        "mezzotint.policy.choose",
        "mezzotint.formats.catalog",
        "mezzotint.recipes.catalog",
        "mezzotint.cli.main",
    ],
)
def test_loads_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_importing_changes_nothing_in_torch() -> None:
    code = (
        "import torch; from torch.library import get_kernel\n"
        "before = torch.get_num_threads(), torch.get_rng_state().sum(), torch.mm, torch.Tensor.backward\n"
        "import mezzotint as mz; [getattr(mz, name) for name in mz.__all__]\n"
        "after = torch.get_num_threads(), torch.get_rng_state().sum(), torch.mm, torch.Tensor.backward\n"
        "assert before == after\n"
        "from mezzotint.lowprec import registration; assert not registration._libraries"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_test_files_have_names_of_their_own():
    """Pytest imports them by their base name, so two of one name cannot be collected together."""
    names = [path.name for path in Path(__file__).parent.rglob("*.py") if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
