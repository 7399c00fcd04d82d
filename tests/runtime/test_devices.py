"""GPU facts: from a stand-in of the driver's libraries (no GPU here), and the real absence of one."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

from wsi_rt.runtime import devices
from wsi_rt.runtime.devices import DRIVER, MANAGEMENT, Gpu, Survey, require_gpu, sm_of, survey
from wsi_rt.runtime.errors import MachineError

L40, H100 = Gpu(0, "NVIDIA L40S", 89, 48 << 30), Gpu(1, "NVIDIA H100 80GB HBM3", 90, 80 << 30)


def store(pointer, value) -> int:
    """As the C functions do, through the caller's `byref`."""
    pointer._obj.value = value
    return 0


class StandInDriver:
    """The functions of libcuda that `survey` calls, with the driver's calling convention."""

    def __init__(self, gpus=(L40, H100), version=13010, init=0) -> None:
        self._gpus, self._version, self._init = gpus, version, init

    def cuInit(self, flags):  # noqa: N802 (the driver's names)
        assert flags == 0
        return self._init

    def cuDriverGetVersion(self, out):  # noqa: N802
        return store(out, self._version)

    def cuDeviceGetCount(self, out):  # noqa: N802
        assert not self._init, "asked after cuInit failed"
        return store(out, len(self._gpus))

    def cuDeviceGet(self, out, index):  # noqa: N802
        return store(out, 100 + index)

    def cuDeviceGetName(self, buffer, size, device):  # noqa: N802
        name = self._gpus[device.value - 100].name.encode()
        assert len(name) < size
        buffer.value = name
        return 0

    def cuDeviceTotalMem_v2(self, out, device):  # noqa: N802
        return store(out, self._gpus[device.value - 100].memory_bytes)

    def cuDeviceGetAttribute(self, out, what, device):  # noqa: N802
        sm = self._gpus[device.value - 100].sm
        return store(out, {75: sm // 10, 76: sm % 10}[what])


class StandInManagement:
    def __init__(self, init=0) -> None:
        self._init = init
        self.open = 0

    def nvmlInit_v2(self):  # noqa: N802
        self.open += not self._init
        return self._init

    def nvmlSystemGetDriverVersion(self, buffer, size):  # noqa: N802
        assert size >= 80
        buffer.value = b"580.65.06"
        return 0

    def nvmlShutdown(self):  # noqa: N802
        self.open -= 1
        return 0


def load_of(driver=None, management=None):
    def load(name):
        library = {DRIVER: driver, MANAGEMENT: management}[name]
        if library is None:
            raise OSError(f"{name}: cannot open shared object file")
        return library

    return load


@pytest.fixture
def machine(monkeypatch):
    """machine(*gpus): what this process then finds."""

    def have(*gpus, problem="the driver sees no GPU"):
        found = Survey(gpus, "580.65.06", (13, 1), None if gpus else problem)
        monkeypatch.setattr(devices, "found", lambda: found)

    return have


def test_what_the_driver_tells():
    management = StandInManagement()
    assert survey(load_of(StandInDriver(), management)) == Survey((L40, H100), "580.65.06", (13, 1), None)
    assert management.open == 0, "NVML is shut down again"
    assert survey(load_of(StandInDriver(version=12080))).cuda == (12, 8)


@pytest.mark.parametrize("management", [None, StandInManagement(init=9)], ids=["absent", "fails"])
def test_without_the_management_library(management):
    found = survey(load_of(StandInDriver(), management))
    assert (found.gpus, found.driver) == ((L40, H100), None)


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        (None, rf"no NVIDIA driver here \({DRIVER} does not load\)"),
        (StandInDriver(gpus=()), "the driver sees no GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES"),
        (StandInDriver(init=100), "the driver sees no GPU"),
        (StandInDriver(init=803), "the driver answers with CUDA error 803"),
    ],
    ids=["no-driver", "no-device", "init-no-device", "init-error"],
)
def test_why_there_is_no_gpu(driver, words, monkeypatch):
    found = survey(load_of(driver, StandInManagement()))
    assert found.gpus == ()
    assert (found.cuda is None) == (driver is None), "the driver tells its CUDA without a device"
    monkeypatch.setattr(devices, "found", lambda: found)
    with pytest.raises(MachineError, match=rf"^tensorrt-rtx needs an NVIDIA GPU: {words}.*--target ort-cpu$") as e:
        require_gpu("tensorrt-rtx")
    assert e.value.exit_code == 3


def test_which_gpu_a_target_gets(machine):
    machine(L40, H100)
    assert require_gpu("ort-cuda") == L40
    assert require_gpu("tensorrt-rtx-sm90") == H100
    assert require_gpu("tensorrt-rtx-sm120") == L40, "the caller tells that it is another architecture's"
    assert devices.gpus() == (L40, H100)
    assert (devices.driver_version(), devices.cuda_version()) == ("580.65.06", (13, 1))


def test_architectures_in_names():
    found = {name: sm_of(name) for name in ("tensorrt-rtx-sm89", "tensorrt-sm120", "tensorrt-rtx", "ort-cpu", "sm89")}
    assert found == {
        "tensorrt-rtx-sm89": 89,
        "tensorrt-sm120": 120,
        "tensorrt-rtx": None,
        "ort-cpu": None,
        "sm89": None,
    }


def test_this_machine_without_a_stand_in():
    """In a process of its own: the real libraries, or their real absence; nothing heavy is imported for it."""
    code = (
        "import sys\n"
        "from wsi_rt.runtime import devices\n"
        "print(len(devices.gpus()), devices.found().problem is None)\n"
        "print({'torch', 'numpy', 'onnxruntime', 'cuda'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, last = done.stdout.splitlines()
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        assert count == "0 False"
    else:
        assert count.split()[1] == str(count.split()[0] != "0")
    assert last == "set()"
