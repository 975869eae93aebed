"""What is set in this process that decides precision and speed, as a value."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchSetup:
    """Torch's build and settings. `problems` are what went wrong while devices were asked for, as sentences.

    `matmul_precision` is torch.get_float32_matmul_precision(), "unknown" where torch refuses to tell. `cuda_archs` are
    the architectures this build has kernels for ("sm_75"). `environment` holds the variables that change speed or
    precision.
    """

    torch_version: str
    python_version: str
    cuda_version: str | None = None
    hip_version: str | None = None
    cuda_archs: tuple[str, ...] = ()
    matmul_precision: str = "highest"
    threads: int = 1
    interop_threads: int = 1
    usable_cores: float | None = None
    physical_cores: int | None = None
    environment: tuple[tuple[str, str], ...] = ()
    has_nvidia_device: bool = False
    nvidia_driver: str | None = None
    problems: tuple[str, ...] = ()


def spell_matmul_precision(setting: str) -> str:
    """Return what a float32 matmul precision setting means, as a clause."""
    return _MEANINGS.get(setting, f"unknown setting {setting!r}")


_MEANINGS = {
    "highest": "float32 products keep all 24 bits",
    "high": "float32 products may use TF32 (11 bits) on hardware that has it",
    "medium": "float32 products may use bfloat16 or TF32 (8 to 11 bits) on hardware that has them",
}
