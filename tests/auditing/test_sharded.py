"""FSDP2, whose tensors are a subclass and whose gradients are added up over processes: no crash, no false statement."""

import subprocess
import sys
from pathlib import Path


def test_fsdp_is_the_same_audited_and_watched(tmp_path: Path):
    script = Path(__file__).parent / "sharded_program.py"
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    for process in ranks:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output[-2000:]
        said = dict(line.split(" ", 1) for line in output.splitlines())
        assert said["plain"] == said["audit"] == said["watch"]
        assert said["reduce"] == "bfloat16"
        assert "not understood" not in said["notes"]
        assert "_reduce_scatter" in said["notes"]
        assert said["watched"] == "4 None []"
