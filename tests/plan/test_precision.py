"""A precision sets torch's switches for a block and puts them back; sizes beyond any machine are refused."""

import pytest
import torch
from typer.testing import CliRunner

from mezzotint.cli.main import app
from mezzotint.hardware.gpus import find_gpu
from mezzotint.plan.precision import default_precisions, in_precision


@pytest.mark.parametrize("had_tf32", [False, True])
def test_the_switch_of_tf32_is_put_back(had_tf32: bool) -> None:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = had_tf32
    try:
        for precision in default_precisions(find_gpu("H100")):
            with in_precision(precision):
                pass
            assert torch.backends.cuda.matmul.allow_tf32 is had_tf32
            with pytest.raises(KeyboardInterrupt), in_precision(precision):
                raise KeyboardInterrupt
            assert torch.backends.cuda.matmul.allow_tf32 is had_tf32
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("option", ["--world", "--steps", "--batch"])
@pytest.mark.parametrize("size", [10**12, 10**400])
def test_sizes_beyond_any_machine_are_refused(option: str, size: int, tmp_path) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('it ran')")
    found = CliRunner().invoke(app, ["plan", option, str(size), str(script)])
    text = found.output + str(found.exception or "")
    assert found.exit_code != 0
    assert "it ran" not in text
    assert len(text) < 1500
