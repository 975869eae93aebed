"""The device table: real device strings find their row, everything else finds nothing."""

import pytest

from mezzotint.formats.catalog import find_format
from mezzotint.hardware.devices import device_specs, find_device

# what torch.cuda.get_device_name and the system say on real machines
REAL_NAMES = {
    "Tesla V100-SXM2-16GB": "V100-SXM2-16GB",
    "Tesla V100-SXM2-32GB": "V100-SXM2-32GB",
    "Tesla V100-PCIE-32GB": "V100-PCIe-32GB",
    "Tesla T4": "T4",
    "NVIDIA GeForce RTX 2080 Ti": "RTX2080Ti",
    "GeForce RTX 2080 Ti": "RTX2080Ti",
    "A100-SXM4-40GB": "A100-SXM-40GB",
    "NVIDIA A100-SXM4-40GB": "A100-SXM-40GB",
    "NVIDIA A100-SXM4-80GB": "A100-SXM-80GB",
    "NVIDIA A100-PCIE-40GB": "A100-PCIe-40GB",
    "NVIDIA A100 80GB PCIe": "A100-PCIe-80GB",
    "NVIDIA GeForce RTX 3090": "RTX3090",
    "NVIDIA GeForce RTX 3090 Ti": "RTX3090Ti",
    "NVIDIA GeForce RTX 4090": "RTX4090",
    "NVIDIA L4": "L4",
    "NVIDIA L40S": "L40S",
    "NVIDIA A10G": "A10G",
    "NVIDIA RTX A6000": "RTX A6000",
    "NVIDIA H100 80GB HBM3": "H100-SXM-80GB",
    "NVIDIA H100 PCIe": "H100-PCIe-80GB",
    "NVIDIA H200": "H200-SXM-141GB",
    "NVIDIA GH200 480GB": "GH200-96GB",
    "NVIDIA B200": "B200",
    "AMD Instinct MI300X": "MI300X",
    "AMD Instinct MI210": "MI210",
    "Apple M2": "Apple M2",
}
# near misses: other cards, slices of cards, and things that are no device
UNKNOWN_NAMES = [
    "NVIDIA H100 NVL",
    "NVIDIA L40",
    "NVIDIA A10",
    "NVIDIA RTX 6000 Ada Generation",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "Tesla V100-PCIE-16GB",
    "Apple M2 Max",
    "AMD Radeon Graphics",
    "NVIDIA",
    "",
    "unknown",
]


@pytest.mark.parametrize(("device_name", "row"), REAL_NAMES.items())
def test_a_real_device_string_finds_its_row(device_name, row):
    spec = find_device(device_name)
    assert spec is not None
    assert spec.name == row


@pytest.mark.parametrize("device_name", UNKNOWN_NAMES)
def test_an_unknown_device_stays_unknown(device_name):
    assert find_device(device_name) is None


@pytest.mark.parametrize("spec", device_specs(), ids=lambda spec: spec.name)
def test_a_row_is_whole_and_its_units_are_plausible(spec):
    assert find_device(spec.name) is spec
    assert spec.source
    for format_name, flops in (*spec.peaks, *spec.achieved):
        assert 1e11 < flops < 2e16
        if format_name != "float4_e2m1fn":
            assert find_format(format_name).name == format_name
    for bandwidth in (spec.bandwidth_bytes_per_second, spec.achieved_bandwidth_bytes_per_second):
        assert bandwidth is None or 5e10 < bandwidth < 2e13
    assert spec.memory_bytes is None or 8 << 30 < spec.memory_bytes < 400 << 30


@pytest.mark.parametrize("spec", device_specs(), ids=lambda spec: spec.name)
def test_peaks_rise_as_formats_narrow(spec):
    order = ("float32", "tfloat32", "bfloat16", "float8_e4m3fn", "float4_e2m1fn")
    peaks = [peak for peak in map(spec.peak_flops_per_second, order) if peak is not None]
    assert peaks == sorted(peaks)


def test_every_name_leads_to_one_row():
    names = [name.lower() for spec in device_specs() for name in {spec.name, *spec.device_names}]
    assert len(names) == len(set(names))


def test_figures_are_dense_and_in_base_units():
    spec = find_device("NVIDIA H100 80GB HBM3")
    assert spec.peak_flops_per_second("bfloat16") == pytest.approx(989e12)  # NVIDIA prints 1979 with sparsity
    assert spec.bandwidth_bytes_per_second == pytest.approx(3.35e12)
    assert spec.memory_bytes == 80 << 30
    assert spec.compute_capability == (9, 0)
    assert find_device("Tesla T4").peak_flops_per_second("bfloat16") is None
