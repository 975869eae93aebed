"""Made-up machines and measurements for the tests of hardware, choice and doctor."""

from mezzotint.hardware.support import DeviceFacts
from mezzotint.hardware.timings import LAYOUTS, MatmulTime, MatmulTimings

OLD_X86 = ("avx", "avx2", "f16c", "fma", "sse4_2")


def cuda(name="Tesla T4", capability=(7, 5), **more):
    return DeviceFacts(kind="cuda", index=0, name=name, compute_capability=capability, **more)


def rocm(architecture, **more):
    return DeviceFacts(kind="cuda", index=0, name="AMD", architecture=architecture, hip_version="6.4", **more)


def cpu(*flags, **more):
    return DeviceFacts(kind="cpu", name="Some CPU", flags=tuple(flags) or OLD_X86, **more)


def timings(device="cpu", *, is_disturbed=False, refused=(), **ratios):
    """Return timings in which each format takes `ratios` of float32's time: one number, or one per layout."""
    times = []
    for name, ratio in {"float32": 1.0, **ratios}.items():
        each = ratio if isinstance(ratio, tuple) else (ratio,) * len(LAYOUTS)
        for layout, value in zip(LAYOUTS, each, strict=True):
            seconds = value * 1e-3
            times.append(
                MatmulTime(format=name, layout=layout, best_seconds=seconds, median_seconds=seconds, samples=9)
            )
    return MatmulTimings(
        device=device,
        threads=2,
        m=256,
        n=384,
        k=384,
        times=tuple(times),
        refused=tuple(refused),
        is_disturbed=is_disturbed,
    )
