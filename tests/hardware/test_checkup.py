"""The MZ3xx findings: each on a machine that deserves it, none on a machine that does not."""

import pytest
from machines import cpu, cuda, rocm, timings

from mezzotint.findings import Severity
from mezzotint.hardware.checkup import check_setup
from mezzotint.hardware.setup import TorchSetup, spell_matmul_precision

A100 = cuda("NVIDIA A100-SXM4-80GB", (8, 0))


def setup(**more):
    return TorchSetup(torch_version="2.13.0", python_version="3.12.0", **more)


def found(devices, **more):
    return {finding.code: finding for finding in check_setup(devices, setup(**more))}


def test_a_healthy_cpu_has_no_findings():
    assert not found([(cpu("avx512_bf16"), timings(bfloat16=0.5, float16=1.1))], threads=2, usable_cores=2)


def test_mz301_bfloat16_that_torch_claims_and_the_card_emulates():
    t4 = cuda("Tesla T4", (7, 5), claims_bfloat16=True)
    finding = found([(t4, timings("cuda:0", bfloat16=1.8))])["MZ301"]
    assert finding.severity is Severity.WARNING
    assert "Tesla T4" in finding.message
    assert finding.evidence["measured_ratio"] == pytest.approx(1.8)
    assert "MZ301" in found([(t4, None)])
    assert "MZ301" in found([(rocm("gfx1030", claims_bfloat16=True), None)])
    assert "MZ301" not in found([(cuda("Tesla T4", (7, 5), claims_bfloat16=False), None)])
    assert "MZ301" not in found([(cuda("NVIDIA L4", (8, 9), claims_bfloat16=True), None)])


def test_mz302_stock_autocast_warns_where_it_is_the_default_and_the_cpu_is_trained_on():
    slow = timings(bfloat16=(5.0, 65.0, 6.0), float16=60.0)
    both = check_setup([(cpu(), slow)], setup())
    assert [(f.code, f.severity) for f in both] == [("MZ302", Severity.WARNING), ("MZ302", Severity.INFO)]
    assert "65 in NN" in both[0].message
    beside_a_gpu = check_setup([(A100, None), (cpu(), slow)], setup(matmul_precision="high"))
    assert {f.severity for f in beside_a_gpu if f.code == "MZ302"} == {Severity.INFO}
    assert "MZ302" not in found([(cpu(), timings(bfloat16=65.0, is_disturbed=True))])


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        ({"threads": 64, "usable_cores": 2.0}, "MZ303"),
        ({"threads": 4, "usable_cores": 0.5}, "MZ303"),
        ({"threads": 1, "usable_cores": 16, "physical_cores": 8}, "MZ304"),
        ({"threads": 3, "usable_cores": 16, "physical_cores": 8}, "MZ304"),
        ({"threads": 8, "usable_cores": 16, "physical_cores": 8}, None),
        ({"threads": 16, "usable_cores": 16, "physical_cores": 8}, None),
        ({"threads": 1, "usable_cores": 2, "physical_cores": 1}, None),
        ({"threads": 1, "usable_cores": 1, "physical_cores": 1}, None),
        ({"threads": 1, "usable_cores": 2}, None),
        ({"threads": 64, "usable_cores": None}, None),
    ],
)
def test_mz303_and_mz304_threads_that_do_not_fit_the_processors(settings, code):
    findings = found([(cpu(), None)], **settings)
    assert set(findings) == ({code} if code else set())


def test_thread_findings_name_the_variable_and_the_fix():
    findings = found([(cpu(), None)], threads=64, usable_cores=4.0, environment=(("OMP_NUM_THREADS", "64"),))
    assert "OMP_NUM_THREADS=64" in findings["MZ303"].message
    assert findings["MZ303"].advice == "set OMP_NUM_THREADS=4"


def test_mz305_and_mz306_the_precision_of_float32_products():
    assert found([(A100, None)])["MZ305"].severity is Severity.INFO
    assert set(found([(A100, None)], matmul_precision="high")) == {"MZ306"}
    assert set(found([(cpu(), None)], matmul_precision="medium")) == {"MZ306"}
    assert not found([(cpu(), None)], matmul_precision="high")
    assert not found([(cuda("Tesla T4", (7, 5)), None)])
    assert not found([(A100, None)], matmul_precision="unknown")


def test_mz307_what_is_there_and_cannot_be_used():
    broken = found([(cpu(), None)], problems=("torch.cuda failed: driver too old",))["MZ307"]
    assert "driver too old" in broken.message
    assert "MZ307" in found([(cpu(), None)], has_nvidia_device=True, nvidia_driver="550.54")
    assert not found([(cpu(), None)], has_nvidia_device=True, cuda_version="12.8")


@pytest.mark.parametrize(
    ("capability", "archs", "is_found"),
    [
        ((3, 7), ("sm_75", "sm_80"), True),
        ((12, 0), ("sm_75", "sm_90"), True),
        ((12, 0), ("sm_75", "sm_90", "compute_90"), False),
        ((8, 6), ("sm_75", "sm_80"), False),
        ((8, 0), ("sm_75", "sm_86"), True),
        ((7, 0), (), False),
    ],
)
def test_mz308_a_build_without_kernels_for_the_card(capability, archs, is_found):
    findings = found([(cuda("card", capability), None)], cuda_archs=archs, matmul_precision="high")
    assert ("MZ308" in findings) == is_found
    if is_found:
        assert findings["MZ308"].severity is Severity.ERROR


def test_mz309_memory_that_others_hold():
    taken = cuda("NVIDIA L4", (8, 9), memory_bytes=24 << 30, free_bytes=6 << 30)
    assert "75% of the memory of cuda:0" in found([(taken, None)])["MZ309"].message
    free = cuda("NVIDIA L4", (8, 9), memory_bytes=24 << 30, free_bytes=23 << 30)
    assert "MZ309" not in found([(free, None)])


def test_mz310_a_machine_too_busy_to_measure():
    assert found([(cpu(), timings(is_disturbed=True))])["MZ310"].severity is Severity.INFO


def test_every_finding_has_advice_and_evidence():
    t4 = cuda("Tesla T4", (7, 5), claims_bfloat16=True, memory_bytes=15 << 30, free_bytes=1 << 30)
    findings = check_setup(
        [(t4, None), (A100, None), (cpu(), timings(bfloat16=9.0, is_disturbed=True))],
        setup(threads=9, usable_cores=2, cuda_archs=("sm_90",), problems=("no",)),
    )
    assert len({f.code for f in findings}) >= 7
    assert all(f.advice and f.evidence for f in findings)


def test_a_setting_is_explained():
    assert "TF32" in spell_matmul_precision("high")
    assert "unknown setting 'odd'" in spell_matmul_precision("odd")
