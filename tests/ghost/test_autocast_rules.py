"""The rules of autocast that probing finds are those of the header that torch is built with."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from mezzotint.errors import PolicyError
from mezzotint.ghost.autocast import autocast_snapshot
from mezzotint.policy.autocast import Rule, Snapshot, changes, differences, load_snapshot

HEADER = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
LISTS = {
    "AT_FORALL_LOWER_PRECISION_FP": Rule.LOWER,
    "AT_FORALL_FP32": Rule.FLOAT32,
    "AT_FORALL_FP32_SET_OPT_DTYPE": Rule.OUTPUT,
    "AT_FORALL_PROMOTE": Rule.PROMOTE,
}


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return autocast_snapshot()


def header_list(macro: str) -> list[str]:
    text = HEADER.read_text()
    body = re.search(rf"#define {macro}\(_\)\s*\\\n(.*?)\n\n", text, re.DOTALL)
    assert body is not None, macro
    return [".".join(part.strip() for part in found.split(",")) for found in re.findall(r"_\(([^()]+)\)", body[1])]


@pytest.mark.parametrize("macro", list(LISTS))
def test_cuda_follows_the_header(snapshot: Snapshot, macro: str):
    names = header_list(macro)
    assert len(names) > 8
    rules = snapshot.rules["cuda"]
    missing = [name for name in names if name not in rules]
    assert all(not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "AutocastCUDA") for name in missing)
    assert len(missing) <= 2  # kernels of CUDA builds only
    assert {name: rules[name] for name in names if name in rules} == {
        name: LISTS[macro] for name in names if name in rules
    }


def test_every_kernel_was_asked(snapshot: Snapshot):
    for device in ("cuda", "cpu"):
        assert not [name for name, rule in snapshot.rules[device].items() if rule in (Rule.UNKNOWN, Rule.NONE)]
    assert snapshot.rules["cuda"]["binary_cross_entropy"] is Rule.ERROR


def test_float16_takes_the_same_lists(snapshot: Snapshot):
    half = autocast_snapshot(torch.float16)
    assert half.rules == snapshot.rules
    # the one difference: float16 softmax reads float16 and writes float32, bfloat16 is copied to float32 first
    assert half.parts["cuda"]["softmax"] == "_softmax float16 to float32"
    assert snapshot.parts["cuda"]["softmax"] == "_to_copy bfloat16 to float32, _softmax float32"


CALLS = {
    "mm": lambda x: x @ x.T,
    "linear": lambda x: F.linear(x, torch.ones(3, 8)),
    "cross_entropy_loss": lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.long)),
    "prod": lambda x: x.prod(),
    "huber_loss": lambda x: F.huber_loss(x, x),
    "linalg_vecdot": lambda x: torch.linalg.vecdot(x, x),
    "trace": lambda x: x[:4, :4].trace(),
    "replication_pad1d": lambda x: F.pad(x[None], (1, 1), mode="replicate"),
}


@pytest.mark.parametrize("name", list(CALLS))
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
def test_cpu_rules_are_what_runs(snapshot: Snapshot, name: str, given: torch.dtype):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = CALLS[name](torch.ones(4, 8, dtype=given)).dtype
    rule = snapshot.rule_of("cpu", name) or snapshot.rule_of("cpu", name.removesuffix("_loss"))
    assert found is {Rule.LOWER: torch.bfloat16, Rule.FLOAT32: torch.float32}[rule]


def test_folklore(snapshot: Snapshot):
    """design facts that documentation has otherwise."""
    found = {one.name: one for one in differences(snapshot, "cuda")}
    assert found["cross_entropy"].written is Rule.FLOAT32
    assert "_log_softmax bfloat16" in found["cross_entropy"].found
    assert found["rms_norm"].written is None
    assert found["rms_norm"].found == "runs in float32"
    assert "mm" not in found


def test_snapshots_are_compared(snapshot: Snapshot, tmp_path: Path):
    path = tmp_path / "now.json"
    path.write_text(json.dumps(snapshot.to_json()))
    assert changes(load_snapshot(path), snapshot) == []
    older = snapshot.to_json()
    del older["rules"]["cuda"]["rms_norm"]  # type: ignore[attr-defined,index]
    older["torch"] = "2.11.0"
    path.write_text(json.dumps(older))
    assert [(one.device, one.name, one.old, one.new) for one in changes(load_snapshot(path), snapshot)] == [
        ("cuda", "rms_norm", None, "float32")
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": "mezzotint.autocast/1", "torch": "2"}'])
def test_no_snapshot(tmp_path: Path, text: str):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(PolicyError, match="snapshot"):
        load_snapshot(path)


@pytest.mark.slow
def test_the_command(snapshot: Snapshot, tmp_path: Path):
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "mezzotint", "policy", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run("--save", "now.json").returncode == 0
    same = run("--diff", "now.json")
    assert (same.returncode, "does the same" in same.stdout) == (0, True)
    body = json.loads((tmp_path / "now.json").read_text())
    body["rules"]["cpu"]["mm"] = "float32"
    (tmp_path / "other.json").write_text(json.dumps(body))
    changed = run("--diff", "other.json", "--against", "now.json", "--json")
    assert changed.returncode == 1
    assert json.loads(changed.stdout)["changes"] == [{"device": "cpu", "name": "mm", "old": "float32", "new": "lower"}]
    shown = json.loads(run("rms_norm", "--json").stdout)
    assert shown["devices"]["cuda"]["rules"] == {"rms_norm": "float32"}
    for arguments, said in (
        (("rmsnorm",), "did you mean rms_norm"),
        (("--diff", "missing.json"), "no snapshot"),
        (("--device", "tpu"), "'tpu'"),
    ):
        done = run(*arguments)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert said in done.stderr
