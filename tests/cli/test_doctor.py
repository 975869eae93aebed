"""`mezzotint doctor`: true on this machine, and unshaken by machines that are old, broken or small."""

import contextlib
import dataclasses
import io
import json
import os
import re
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from mezzotint.cli import doctor as command
from mezzotint.findings import Finding
from mezzotint.hardware import host, measure
from mezzotint.hardware.support import REPORTED_FORMATS
from mezzotint.hardware.timings import LAYOUTS, MatmulTime, MatmulTimings
from mezzotint.policy.grammar import parse_policy

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(command.doctor)


def run(*arguments):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def fake_timings(device, ratios, **more):
    times = tuple(
        MatmulTime(format=name, layout=layout, best_seconds=ratio * 1e-3, median_seconds=ratio * 1e-3, samples=9)
        for name, ratio in ratios.items()
        for layout in LAYOUTS
    )
    return MatmulTimings(device=device, threads=2, m=256, n=384, k=384, times=times, **more)


@pytest.fixture
def measured(monkeypatch):
    """Let every device be measured in no time; a test may put other ratios or an error in the mapping."""
    table = {"cpu": {"float64": 2.0, "float32": 1.0, "bfloat16": 0.5, "float16": 1.1}}

    def measure_matmul(device, formats):
        found = table.get(device, {})
        if isinstance(found, Exception):
            raise found
        return fake_timings(device, found)

    monkeypatch.setattr(measure, "measure_matmul", measure_matmul)
    monkeypatch.setattr(measure, "copy_bytes_per_second", lambda device: 31.4e9)
    return table


@pytest.fixture
def t4(monkeypatch, measured):
    properties = SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=15 << 30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (14 << 30, 15 << 30))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    measured["cuda:0"] = {"float64": 30.0, "float32": 1.0, "bfloat16": 1.8, "float16": 0.15}


def report():
    result = run("--json")
    return result.exit_code, json.loads(result.stdout)


def test_the_true_machine_in_one_json_object(monkeypatch):
    code, found = report()
    assert found["schema"] == "mezzotint.doctor/1"
    cpu = found["devices"][-1]
    assert cpu["device"] == "cpu"
    assert [support["format"] for support in cpu["formats"]] == list(REPORTED_FORMATS)
    by_format = {support["format"]: support for support in cpu["formats"]}
    assert by_format["float32"]["measured_ratio"] == 1.0
    assert by_format["bfloat16"]["measured_ratio"] > 0
    assert set(by_format["bfloat16"]["measured_ratios"]) == set(LAYOUTS)
    assert cpu["copy_bytes_per_second"] > 0
    assert [choice["format"] for choice in cpu["kernels"]] == ["bfloat16", "float16"]
    assert found["setup"]["torch_version"] == torch.__version__
    assert parse_policy(found["policy"]["value"])
    assert found["policy"]["reasons"]
    serious = [f for f in found["findings"] if f["severity"] != "info"]
    assert code == (1 if serious else 0)


def test_findings_have_the_shape_of_the_contract(measured):
    measured["cpu"] = {"float32": 1.0, "bfloat16": 65.0, "float16": 60.0}
    code, found = report()
    assert code == 1
    slow = [f for f in found["findings"] if f["code"] == "MZ302"]
    assert len(slow) == 2
    for finding in found["findings"]:
        assert set(finding) == {f.name for f in dataclasses.fields(Finding)}
        assert re.fullmatch(r"MZ3\d\d", finding["code"])


def test_a_cpu_says_whose_kernels_compute_16_bits(measured, monkeypatch):
    monkeypatch.delenv("MEZZOTINT_LOWPREC", raising=False)
    measured["cpu"] = {"float32": 1.0, "bfloat16": 0.5, "float16": 60.0}
    kernels = {choice["format"]: choice for choice in report()[1]["devices"][0]["kernels"]}
    assert kernels["bfloat16"]["path"] == "stock"
    assert kernels["float16"]["path"] in ("packed", "upcast")
    text = " ".join(run().stdout.split())
    assert "bfloat16 training by torch's kernels" in text
    assert "float16 training by mezzotint's kernels: torch's float16 matmul takes up to 60 times" in text


def test_a_clean_machine_exits_with_0(measured, monkeypatch):
    monkeypatch.setattr(host, "usable_cores", lambda: float(torch.get_num_threads()))
    monkeypatch.setattr(host, "has_nvidia_device", lambda: False)
    result = run("--device", "cpu")
    assert result.exit_code == 0
    assert "no findings" in result.stdout


def test_a_t4_trains_in_float16_and_bfloat16_is_called_emulated(t4):
    code, found = report()
    assert code == 1
    assert [device["device"] for device in found["devices"]] == ["cuda:0", "cpu"]
    by_format = {support["format"]: support["support"] for support in found["devices"][0]["formats"]}
    assert (by_format["bfloat16"], by_format["float16"]) == ("emulated", "native")
    assert found["devices"][0]["spec"]["name"] == "T4"
    assert "compute=float16" in found["policy"]["value"]
    assert "MZ301" in {f["code"] for f in found["findings"]}
    only_cpu = json.loads(run("--json", "--device", "cpu").stdout)
    assert [device["device"] for device in only_cpu["devices"]] == ["cpu"]


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), OSError("driver gone"), KeyError("x")])
def test_a_card_that_cannot_be_measured_is_still_described(t4, measured, error):
    measured["cuda:0"] = error
    _, found = report()
    assert found["devices"][0]["matmul"] is None
    assert "not measured" in found["policy"]["reasons"][0]
    assert "Tesla T4" in run().stdout


def test_a_build_without_kernels_for_the_card_is_an_error(t4, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    code, found = report()
    assert code == 1
    assert {f["code"]: f["severity"] for f in found["findings"]}["MZ308"] == "error"


def test_a_broken_driver_is_a_finding(measured, monkeypatch):
    def broken():
        raise RuntimeError("Unexpected error from cudaGetDeviceCount()")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    code, found = report()
    assert code == 1
    assert "cudaGetDeviceCount" in str(found["findings"])
    assert [device["device"] for device in found["devices"]] == ["cpu"]


def test_one_core_and_a_system_that_tells_nothing(measured, monkeypatch):
    for name in ("usable_cores", "physical_cores", "memory_bytes", "free_memory_bytes", "os_version"):
        monkeypatch.setattr(host, name, lambda: None)
    monkeypatch.setattr(host, "cpu_name", lambda: "unknown")
    monkeypatch.setattr(host, "cpu_flags", lambda: ())
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert "unknown" in run().stdout
    monkeypatch.setattr(host, "usable_cores", lambda: 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    code, found = report()
    assert code == 1
    assert "MZ303" in {f["code"] for f in found["findings"]}


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
def test_the_report_fits_the_terminal(t4, columns):
    buffer = io.StringIO()
    console = Console(file=buffer, width=columns)
    for part in command.render(command.diagnose()):
        console.print(part)
    text = buffer.getvalue()
    assert max(len(line) for line in text.splitlines()) <= columns
    if columns >= 80:
        for words in ("Tesla T4", "compute capability 7.5", "bfloat16", "fp16-mixed", "MZ301", "31.4 GB/s"):
            assert words in text


def colours(environment):
    script = "import sys; from mezzotint.cli.main import main; sys.argv = ['mezzotint', 'doctor']; main()"
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": "100", **environment}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 1), done.stderr
    return set(re.findall(r"\x1b\[([\d;]+)m", done.stdout))


def test_no_color_is_honoured_and_a_read_only_home_does_not_matter(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(stat.S_IRUSR | stat.S_IXUSR)
    found = colours({"NO_COLOR": "1", "HOME": str(home)})
    assert not {code for code in found if re.search(r"(^|;)(3[0-7]|9[0-7])(;|$)", code)}
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("device", ["cuda:97", "abacus"])
def test_a_device_that_is_not_here_is_misuse(device):
    done = subprocess.run(
        [sys.executable, "-m", "mezzotint.cli.main", "doctor", "--device", device],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"mezzotint: error: device '{device}' cannot be used here.*; pass one of .*cpu\n", done.stderr)


def test_a_model_that_does_not_fit_is_an_error(measured):
    done = run("--device", "cpu", "--parameters", "900B", "--json")
    assert done.exit_code == 1
    assert "MZ311" in [finding["code"] for finding in json.loads(done.stdout)["findings"]]
    small = run("--device", "cpu", "--parameters", "1M", "--json")
    assert "MZ311" not in [finding["code"] for finding in json.loads(small.stdout)["findings"]]
