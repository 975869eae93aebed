"""Every kind of tensor in every public call that reads by address: served or refused in words, never a crash."""

import subprocess
import sys
from pathlib import Path


def test_every_kind_of_tensor_in_every_call():
    script = Path(__file__).parent / "tensor_kinds.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=300)
    last = done.stdout.strip().splitlines()[-1:]
    assert last == ["end"], f"at {last}, exit {done.returncode}\n{done.stderr[-1500:]}"
    assert done.returncode == 0
