"""Runs killed at random moments have the losses and weights of the run that was never stopped.

The smallest version of benchmarks/kills.py, which kills runs of every policy and proofs.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "kills.py"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the script forks its runs")
def test_killed_again_and_again_a_run_ends_like_one_that_was_never_stopped() -> None:
    policies = ["bf16-mixed", "bf16-stochastic", "fp8-mixed"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--unchecked", "--kills", "3", "--steps", "16", "--only", *policies],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stderr.splitlines() if "kills, " in line] == [
        f"{policy}: 3 kills, yes" for policy in policies
    ]
