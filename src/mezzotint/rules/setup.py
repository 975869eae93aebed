"""The rules about a machine's set-up, MZ3xx, which `mezzotint doctor` judges: their words, and how they look.

What is measured and decided is in `mezzotint.hardware.checkup` and `mezzotint.policy.memory`; the subject of these
rules is what those found.
"""

from collections.abc import Callable, Iterable, Iterator

from mezzotint.findings import Finding, Severity
from mezzotint.rules.rule import Rule

Findings = Iterable[Finding]


def _findings_of(code: str) -> Callable[[Findings], Iterator[Finding]]:
    def check(findings: Findings) -> Iterator[Finding]:
        return (one for one in findings if one.code == code)

    return check


def _rule(code: str, name: str, severity: Severity, **words: str) -> Rule[Findings]:
    return Rule(code=code, name=name, severity=severity, check=_findings_of(code), **words)  # type: ignore[arg-type]


RULES: tuple[Rule[Findings], ...] = (
    _rule(
        "MZ301", "emulated-bfloat16", Severity.WARNING,
        summary="torch says that a GPU supports bfloat16, and it is emulated",
        why="torch.cuda.is_bf16_supported() includes emulation, which is slower than float32.",
        bad='device = "cuda"  # a T4\ntorch.autocast(device, dtype=torch.bfloat16)',
        good='device = "cuda"  # a T4\ntorch.autocast(device, dtype=torch.float16)  # with a GradScaler',
        fix="Train with the policy fp16-mixed, or ask is_bf16_supported(including_emulation=False).",
    ),
    _rule(
        "MZ302", "slow-autocast", Severity.WARNING,
        summary="autocast on this CPU is slower than float32",
        why="A CPU without instructions for a format converts every factor, and some of torch's kernels are slow.",
        bad='with torch.autocast("cpu", dtype=torch.bfloat16):\n    loss = model(inputs)',
        good='with mz.fast_cpu("bfloat16"):\n    loss = model(inputs)',
        fix="Train in float32, or with mezzotint's own CPU kernels.",
    ),
    _rule(
        "MZ303", "too-many-threads", Severity.WARNING,
        summary="torch computes with more threads than processors that may be used",
        why="The threads take turns on the processors, and each waits for the slowest at the end of every operation.",
        bad="OMP_NUM_THREADS=64 python train.py  # in a container of 8 processors",
        good="OMP_NUM_THREADS=8 python train.py",
        fix="Set OMP_NUM_THREADS to the number of processors that may be used.",
    ),
    _rule(
        "MZ304", "too-few-threads", Severity.WARNING,
        summary="torch computes with far fewer threads than there are cores",
        why="Matmul on a CPU gets faster with each core, and the others are idle.",
        bad="OMP_NUM_THREADS=1 python train.py  # on 16 cores",
        good="OMP_NUM_THREADS=16 python train.py",
        fix="Set OMP_NUM_THREADS to the number of cores, or unset it.",
    ),
    _rule(
        "MZ305", "tf32-off", Severity.INFO,
        summary="TF32 is off on a device that has it",
        why="Float32 matmul then runs without tensor cores, at a fraction of their speed.",
        bad='torch.set_float32_matmul_precision("highest")  # the default',
        good='torch.set_float32_matmul_precision("high")',
        fix="Turn it on where 11 bits of each factor are enough.",
    ),
    _rule(
        "MZ306", "reduced-float32-matmul", Severity.INFO,
        summary="float32 matmul runs in less than float32",
        why="A float32 run that others are compared with then has rounded factors itself.",
        bad='torch.set_float32_matmul_precision("medium")',
        good='torch.set_float32_matmul_precision("highest")',
        fix="Set the precision to highest for a control run.",
    ),
    _rule(
        "MZ307", "unusable-device", Severity.WARNING,
        summary="a device is there and torch cannot use it",
        why="Training then runs on the CPU, often without a word.",
        bad="pip install torch --index-url https://download.pytorch.org/whl/cpu  # on a machine with a GPU",
        good="pip install torch",
        fix="Check the driver (nvidia-smi, rocm-smi), and install a build of torch for it.",
    ),
    _rule(
        "MZ308", "no-kernels-for-device", Severity.ERROR,
        summary="this build of torch has no kernels for the device",
        why="The first operation on the device fails with: no kernel image is available for execution on the device.",
        bad="pip install torch  # built for sm_75 and later, on a GPU of compute capability 6.1",
        good="pip install torch --index-url ...  # a build whose architectures include the device's",
        fix="Install a build of torch for an older or a newer version of CUDA, as the finding says.",
    ),
    _rule(
        "MZ309", "taken-memory", Severity.WARNING,
        summary="most of a device's memory is taken by other programs",
        why="A run that fits the device then ends with an out-of-memory error.",
        bad="python train.py  # while a notebook holds 60 of 80 GiB",
        good="nvidia-smi  # end what holds the memory, then: python train.py",
        fix="See who holds it with nvidia-smi or rocm-smi.",
    ),
    _rule(
        "MZ310", "busy-machine", Severity.INFO,
        summary="the machine was too busy to measure",
        why="Times that were measured beside other programs decide nothing; the device's flags are used instead.",
        bad="make -j & mezzotint doctor",
        good="mezzotint doctor",
        fix="Run the command again when the machine is quiet.",
    ),
    _rule(
        "MZ311", "states-exceed-memory", Severity.ERROR,
        summary="weights, gradients and optimizer states do not fit the device's memory",
        why="They are needed in every step, before any activation.",
        bad="mezzotint doctor --parameters 7B  # on a GPU of 24 GiB",
        good="mezzotint doctor --parameters 1B",
        fix="Shard weights and states over several devices, train fewer parameters, or free memory.",
    ),
)  # fmt: skip
