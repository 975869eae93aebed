"""What the operating system says, read from made-up system files."""

import os
import platform

import pytest

from mezzotint.hardware import host

CPUINFO = """processor : 0
model name\t: Test CPU @ 2.0GHz
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu sse2 avx2

processor : 1
model name\t: Test CPU @ 2.0GHz
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu sse2 avx2

processor : 2
physical id\t: 1
core id\t\t: 0
"""
MEMINFO = "MemTotal:       16000000 kB\nMemFree:  1 kB\nMemAvailable:    4000000 kB\n"


@pytest.fixture
def files(monkeypatch):
    """Replace every system file by the mapping that the test fills; what is not in it does not exist."""
    known = {}
    monkeypatch.setattr(host, "_read", lambda path: known.get(str(path), ""))
    return known


def test_the_cpu_is_named_and_its_cores_are_counted_once(files):
    files["/proc/cpuinfo"] = CPUINFO
    assert host.cpu_name() == "Test CPU @ 2.0GHz"
    assert host.cpu_flags() == ("avx2", "fpu", "sse2")
    assert host.physical_cores() == 2


def test_memory_is_the_machines_or_the_containers(files):
    files["/proc/meminfo"] = MEMINFO
    files["/proc/self/cgroup"] = "0::/pod/box\n"
    assert host.memory_bytes() == 16000000 * 1024
    assert host.free_memory_bytes() == 4000000 * 1024
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert host.memory_bytes() == 16000000 * 1024
    files["/sys/fs/cgroup/pod/memory.max"] = "1073741824\n"
    assert host.memory_bytes() == 1 << 30


@pytest.mark.parametrize(
    ("group", "limits"),
    [
        ("0::/pod/box", {"/sys/fs/cgroup/pod/box/cpu.max": "50000 100000"}),
        ("0::/", {"/sys/fs/cgroup/cpu.max": "50000 100000"}),
        ("", {"/sys/fs/cgroup/cpu.max": "50000 100000"}),
        (
            "3:cpu,cpuacct:/pod",
            {
                "/sys/fs/cgroup/cpu,cpuacct/pod/cpu.cfs_quota_us": "50000",
                "/sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us": "50000",
                "/sys/fs/cgroup/cpu/pod/cpu.cfs_period_us": "100000",
            },
        ),
    ],
)
def test_a_containers_cpu_limit_counts(files, group, limits):
    files["/proc/self/cgroup"] = group
    files.update(limits)
    assert host.usable_cores() == 0.5


@pytest.mark.parametrize("text", ["max 100000", "-1", "0 0", "rubbish", ""])
def test_no_limit_leaves_the_processors_that_exist(files, text):
    files["/proc/self/cgroup"] = "0::/\n"
    files["/sys/fs/cgroup/cpu.max"] = text
    assert 1 <= host.usable_cores() <= os.cpu_count()


def test_a_system_that_tells_nothing_is_unknown(files, monkeypatch):
    def no_answer(*_):
        raise ValueError

    monkeypatch.setattr(os, "sysconf", no_answer)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "system", lambda: "Plan 9")
    assert host.cpu_name() == "unknown"
    assert host.cpu_flags() == ()
    assert host.physical_cores() is None
    assert host.usable_cores() is None
    assert host.memory_bytes() is None
    assert host.free_memory_bytes() is None


def test_apple_tells_through_sysctl(files, monkeypatch):
    answers = {
        "machdep.cpu.brand_string": "Apple M2",
        "hw.optional.arm.FEAT_BF16": "1",
        "hw.optional.arm.FEAT_FP16": "0",
        "hw.physicalcpu": "8",
        "hw.memsize": str(16 << 30),
    }
    monkeypatch.setattr(host, "_sysctl", lambda key: answers.get(key, ""))
    monkeypatch.setattr(host, "_sysconf_memory", lambda pages: None)
    assert host.cpu_name() == "Apple M2"
    assert host.cpu_flags() == ("bf16",)
    assert host.physical_cores() == 8
    assert host.memory_bytes() == 16 << 30


def test_sysctl_is_not_asked_elsewhere_and_may_be_missing(monkeypatch):
    assert platform.system() == "Darwin" or host._sysctl("hw.memsize") == ""
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(host.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(FileNotFoundError()))
    assert host._sysctl("hw.memsize") == ""


def test_the_nvidia_driver(files):
    assert host.nvidia_driver() is None
    files["/proc/driver/nvidia/version"] = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug"
    assert host.nvidia_driver() == "535.104.05"
    files["/sys/module/nvidia/version"] = "550.54.15\n"
    assert host.nvidia_driver() == "550.54.15"
    assert host.has_nvidia_device()
