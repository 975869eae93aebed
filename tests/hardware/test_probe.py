"""Probing: the true machine, and made-up ones whose drivers are old, broken or absent."""

from types import SimpleNamespace

import pytest
import torch

from mezzotint.errors import ConfigError
from mezzotint.hardware import host
from mezzotint.hardware.probe import probe, probe_devices, probe_setup


def fake_cuda(monkeypatch, *, count=1, properties=None, claims=True):
    known = properties or SimpleNamespace(name="Tesla T4", major=7, minor=5, total_memory=15 << 30)

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: known)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (14 << 30, 15 << 30))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: claims)
    monkeypatch.setattr(torch.cuda, "device", Device)


def test_the_cpu_is_always_found_and_comes_last():
    devices = probe_devices()
    facts = devices[-1]
    assert (facts.kind, facts.device, facts.index) == ("cpu", "cpu", None)
    assert facts.threads == torch.get_num_threads()
    assert facts.memory_bytes > 1 << 28
    assert facts.torch_version == torch.__version__
    assert facts.is_here
    assert probe("cpu") == probe("CPU") == facts or facts.free_bytes is not None


def test_probing_changes_nothing():
    before = torch.get_rng_state(), torch.get_num_threads(), torch.get_float32_matmul_precision()
    probe_devices()
    probe_setup()
    after = torch.get_rng_state(), torch.get_num_threads(), torch.get_float32_matmul_precision()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("device", ["cuda:97", "tpu", "", "cuda:x", "meta", "cpu:1"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(device):
    with pytest.raises(ConfigError, match=r"cannot be used here.*pass one of .*cpu"):
        probe(device)


def test_an_old_gpu_is_read_and_comes_first(monkeypatch):
    fake_cuda(monkeypatch, count=2)
    first, second, *_ = probe_devices()
    assert (first.device, second.device) == ("cuda:0", "cuda:1")
    assert first.name == "Tesla T4"
    assert first.compute_capability == (7, 5)
    assert first.claims_bfloat16 is True
    assert first.free_bytes == 14 << 30
    assert probe().device == "cuda:0"
    assert probe("cuda").device == "cuda:0"
    assert probe(torch.device("cuda:1")).device == "cuda:1"


def test_an_amd_gpu_is_known_by_its_architecture(monkeypatch):
    found = SimpleNamespace(name="AMD", major=9, minor=4, total_memory=192 << 30, gcnArchName="gfx942:sramecc+")
    fake_cuda(monkeypatch, properties=found)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    facts = probe()
    assert facts.is_rocm
    assert facts.architecture == "gfx942:sramecc+"
    assert facts.compute_capability is None


def raising(*_args):
    raise RuntimeError("CUDA driver initialization failed, you might not have a CUDA gpu.\nTraceback")


@pytest.mark.parametrize("call", ["is_available", "device_count", "get_device_properties"])
def test_a_broken_driver_is_a_problem_and_not_a_crash(monkeypatch, call):
    fake_cuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, call, raising)
    assert [facts.kind for facts in probe_devices()] == ["cpu"]
    (problem,) = probe_setup().problems
    assert "CUDA driver initialization failed" in problem
    assert "Traceback" not in problem
    with pytest.raises(ConfigError, match="driver initialization failed"):
        probe("cuda")


@pytest.mark.parametrize("call", ["mem_get_info", "is_bf16_supported"])
def test_what_a_driver_does_not_tell_is_unknown(monkeypatch, call):
    fake_cuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, call, raising)
    facts = probe("cuda")
    assert None in (facts.free_bytes, facts.claims_bfloat16)


def test_a_warning_of_the_driver_is_kept_as_a_problem(monkeypatch):
    def warns():
        import warnings

        warnings.warn("CUDA initialization: The NVIDIA driver on your system is too old.", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", warns)
    assert probe_setup().problems == ("CUDA initialization: The NVIDIA driver on your system is too old",)


def test_intel_gpus_bring_their_capabilities(monkeypatch):
    found = SimpleNamespace(name="Arc", total_memory=16 << 30, has_fp16=True, has_fp64=False, driver_version="1.3")
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 1)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: found)
    facts = probe("xpu")
    assert facts.flags == ("has_fp16",)
    assert facts.driver == "1.3"


def test_apple_gpus(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", raising)
    monkeypatch.setattr(host, "os_version", lambda: (14, 5))
    facts = probe("mps")
    assert (facts.device, facts.memory_bytes, facts.os_version) == ("mps", None, (14, 5))
    monkeypatch.setattr(torch.backends.mps, "is_available", raising)
    assert "torch.backends.mps failed" in probe_setup().problems[0]


def test_a_torch_without_its_private_answers_is_unknown(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(host, "cpu_flags", lambda: ())
    assert probe("cpu").flags == ()


def test_settings_are_read(monkeypatch):
    monkeypatch.setenv("DNNL_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(torch, "get_float32_matmul_precision", raising)
    setup = probe_setup()
    assert ("DNNL_MAX_CPU_ISA", "AVX2") in setup.environment
    assert setup.matmul_precision == "unknown"
    assert setup.problems == ()
