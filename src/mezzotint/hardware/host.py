"""What the operating system says about processor and memory: Linux in full, macOS and Windows as far as it goes.

Nothing here raises: what cannot be read is None or empty. Containers are the reason for reading more than core counts:
a limit of two processors on a 64-core host is invisible to `os.cpu_count`, and 64 threads on it crawl.
"""

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def cpu_name() -> str:
    """Return the processor's name, "unknown" where the system does not tell."""
    found = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return (found[1] if found else _sysctl("machdep.cpu.brand_string") or platform.processor()).strip() or "unknown"


def cpu_flags() -> tuple[str, ...]:
    """Return the instruction-set extensions in the words of the kernel, sorted; empty where it does not tell."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    if found:
        return tuple(sorted(set(found[1].split())))
    # Apple's processors; the words on the right are the Linux kernel's
    apple = {"hw.optional.arm.FEAT_BF16": "bf16", "hw.optional.arm.FEAT_FP16": "asimdhp", "hw.optional.neon": "asimd"}
    return tuple(sorted(word for key, word in apple.items() if _sysctl(key) == "1"))


def physical_cores() -> int | None:
    """Return the number of cores, hyperthreads not counted, or None where the system does not tell."""
    cores = set(re.findall(r"^physical id\s*:\s*(\d+)$.*?^core id\s*:\s*(\d+)$", _read("/proc/cpuinfo"), _EACH_CPU))
    return len(cores) or _int(_sysctl("hw.physicalcpu"))


_EACH_CPU = re.MULTILINE | re.DOTALL


def usable_cores() -> float | None:
    """Return how many processors this process may use: the least of what exists, affinity and container limit."""
    known: list[float] = [count for count in (os.cpu_count(),) if count]
    with contextlib.suppress(AttributeError, OSError):  # no such call on macOS and Windows
        known.append(len(os.sched_getaffinity(0)))
    known.extend(_cgroup_cpu_limits())
    return min(known, default=None)


def memory_bytes() -> int | None:
    """Return the memory that this process may use: the machine's, or the container's limit if that is less."""
    total = _meminfo("MemTotal") or _sysconf_memory("SC_PHYS_PAGES") or _int(_sysctl("hw.memsize")) or _windows_memory()
    limits = [limit for limit in _cgroup_memory_limits() if total is None or limit < total]
    return min(limits, default=total)


def free_memory_bytes() -> int | None:
    """Return the memory that can be had without swapping, or None where the system does not tell."""
    return _meminfo("MemAvailable") or _sysconf_memory("SC_AVPHYS_PAGES")


def os_version() -> tuple[int, ...] | None:
    """Return the version of macOS, or None elsewhere."""
    numbers = tuple(int(part) for part in platform.mac_ver()[0].split(".") if part.isdigit())
    return numbers or None


def nvidia_driver() -> str | None:
    """Return the version of the NVIDIA kernel driver, or None where there is none."""
    found = _read("/sys/module/nvidia/version").strip()
    if not found:
        match = re.search(r"Kernel Module\D*([\d.]+)", _read("/proc/driver/nvidia/version"))
        found = match[1] if match else ""
    return found or None


def has_nvidia_device() -> bool:
    """Return whether the system shows an NVIDIA card, whatever torch thinks of it."""
    return Path("/dev/nvidia0").exists() or nvidia_driver() is not None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _int(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _meminfo(key: str) -> int | None:
    found = re.search(rf"^{key}:\s*(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


def _sysconf_memory(pages: str) -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf(pages)
    except (AttributeError, ValueError, OSError):
        return None


def _sysctl(key: str) -> str:
    if platform.system() != "Darwin":
        return ""
    try:
        done = subprocess.run(["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _windows_memory() -> int | None:
    if platform.system() != "Windows":
        return None
    try:
        import ctypes

        kilobytes = ctypes.c_ulonglong()
        kernel32 = getattr(ctypes, "windll").kernel32  # noqa: B009  the name exists on Windows only
        return kilobytes.value * 1024 if kernel32.GetPhysicallyInstalledSystemMemory(ctypes.byref(kilobytes)) else None
    except (AttributeError, OSError):
        return None


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """Yield the folders that may hold this process's limits: its own group's and the root's, version 2 and 1."""
    for line in _read("/proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, group = rest.partition(":")
        if number == "0" or controller in names.split(","):
            base = _CGROUP if number == "0" else _CGROUP / controller
            inner = base / group.strip("/")
            yield from (folder for folder in (inner, *inner.parents) if folder.is_relative_to(base))
    yield _CGROUP
    yield _CGROUP / controller


def _cgroup_cpu_limits() -> list[float]:
    limits = []
    for folder in _cgroup_folders("cpu"):
        quota, _, period = _read(folder / "cpu.max").strip().partition(" ")
        if not quota:
            quota, period = (_read(folder / f"cpu.cfs_{word}_us").strip() for word in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(quota) and int(period):
            limits.append(int(quota) / int(period))
    return limits


def _cgroup_memory_limits() -> list[int]:
    limits = []
    for folder in _cgroup_folders("memory"):
        for file in ("memory.max", "memory.limit_in_bytes"):
            limit = _int(_read(folder / file).strip())
            if limit:
                limits.append(limit)
    return limits
