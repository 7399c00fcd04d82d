"""Checks that the operators share: devices, cumulative lengths, numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")

from wsi_rt.kernels import checks  # noqa: E402
from wsi_rt.kernels.errors import KernelInputError  # noqa: E402

CU = torch.tensor([0, 4, 9])


def test_cumulative_lengths_are_read_once_and_handed_on(monkeypatch):
    assert checks.check_cu_values("op", CU, 9, 1) == [0, 4, 9]
    monkeypatch.setattr(checks, "values_readable", lambda x: False)
    assert checks.check_cu_values("op", CU, 9, 1) is None


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_devices_are_refused(kind):
    stand_in = SimpleNamespace(device=torch.device(kind, 0), is_cuda=False)
    with pytest.raises(KernelInputError, match=f"op: x is on {kind}:0, expected the CPU or an NVIDIA GPU"):
        checks.check_one_device("op", {"x": stand_in})


def test_rocm_is_not_cuda(monkeypatch):
    stand_in = SimpleNamespace(device=torch.device("cuda", 0), is_cuda=True)
    checks.check_one_device("op", {"x": stand_in})
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(KernelInputError, match=r"x is on an AMD GPU \(ROCm 6.4\), expected the CPU or an NVIDIA GPU"):
        checks.check_one_device("op", {"x": stand_in})


def test_lengths_are_not_copied_to_a_gpu_that_captures(monkeypatch):
    assert checks.cu_on_device("op", CU, CU.device) is CU
    monkeypatch.setattr(checks, "capturing", lambda device: True)  # a stand-in: there is no capture without a GPU
    assert checks.cu_on_device("op", CU, CU.device) is CU
    with pytest.raises(KernelInputError, match="op: cu_seqlens is on cpu while a CUDA graph is captured"):
        checks.cu_on_device("op", CU, torch.device("meta"))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "1", None, True], ids=str)
def test_what_is_no_finite_number_is_refused(value):
    checks.check_finite("op", {"mean": (0, 0.5)})
    with pytest.raises(KernelInputError, match=rf"op: mean holds {value!r}, expected finite numbers"):
        checks.check_finite("op", {"mean": (0.5, value)})
