"""What every test needs: a token cache of its own, so that no test writes into the user's home."""

import os
import tempfile

# set before anything of mezzotint reads it, and inherited by the commands that tests start
os.environ.setdefault("MEZZOTINT_CACHE", os.path.join(tempfile.gettempdir(), "mezzotint-test-cache"))  # noqa: PTH118
# torch.compile would keep a pool of compiling processes beside the tests, on every core
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
from collections.abc import Iterable

import pytest


def pytest_collection_modifyitems(items: Iterable[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        reason = f"no CUDA device: torch {torch.__version__} sees none here"
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))
