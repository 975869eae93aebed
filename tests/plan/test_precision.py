"""A precision sets torch's switches for a block and puts them back; sizes beyond any machine are refused."""

import re

import pytest
import torch
from typer.testing import CliRunner

from mezzotint.cli.main import app
from mezzotint.errors import UserError
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
    text = f"{found.output}{found.exception or ''}"
    assert found.exit_code == 2 or isinstance(found.exception, UserError)  # `main` makes it exit code 2
    assert re.search(r"must be at most|not a valid int|is not in the range", " ".join(text.split())), text
    assert "it ran" not in text
    assert len(text) < 1500


@pytest.mark.parametrize(("gpu", "is_emulated"), [("T4", True), ("V100", True), ("A100", False)])
def test_emulated_bfloat16_is_said(gpu: str, is_emulated: bool) -> None:
    from mezzotint.plan.plan import emulates_bfloat16
    from mezzotint.plan.recording import Recording
    from mezzotint.trace.recorder import Recorder

    recording, recorder = Recording(gpu), Recorder(has_ranges=False)
    with recording.within(recorder), recorder:
        x = torch.randn(16, 16, device="cuda")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            x @ x
    assert emulates_bfloat16(recording.run(recorder.trace())) is is_emulated
