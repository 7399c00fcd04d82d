"""read_tensor and write_tensor against real torch."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from wsi_rt.runtime.errors import FeatureFileError
from wsi_rt.runtime.features import read_tensor, write_tensor

torch = pytest.importorskip("torch", reason="compares with files of real torch")

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]


def _values(dtype: str, shape=(3, 5)):
    return (torch.arange(torch.Size(shape).numel()) % 7 - 2).reshape(shape).to(getattr(torch, dtype))


def _same(array: np.ndarray, tensor) -> None:
    expected = tensor.detach()
    expected = (expected.float() if expected.dtype == torch.bfloat16 else expected).numpy()
    assert array.dtype == expected.dtype
    assert array.shape == expected.shape
    np.testing.assert_array_equal(array, expected)
    assert array.flags.c_contiguous
    assert array.flags.owndata or array.base is not None
    assert array.flags.writeable


@pytest.mark.parametrize("dtype", DTYPES)
def test_reads_every_dtype(tmp_path, dtype):
    tensor = _values(dtype)
    torch.save(tensor, tmp_path / "t.pt")
    _same(read_tensor(tmp_path / "t.pt"), tensor)


def test_bfloat16_is_exact_for_every_bit_pattern_of_numbers(tmp_path):
    tensor = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    torch.save(tensor, tmp_path / "t.pt")
    np.testing.assert_array_equal(read_tensor(tmp_path / "t.pt"), tensor.float().numpy())


VIEWS = {
    "slice-of-larger": lambda: torch.arange(4096.0)[1000 : 1000 + 1536],
    "transposed": lambda: torch.arange(24.0).reshape(4, 6).t(),
    "expanded": lambda: torch.arange(4.0).reshape(4, 1).expand(4, 9),
    "every-other": lambda: torch.arange(64.0).reshape(8, 8)[1::2, ::3],
    "last-element": lambda: torch.arange(10.0)[9:],
    "scalar": lambda: torch.tensor(3.5),
    "empty": lambda: torch.empty(0, 7),
    "one-of-stride": lambda: torch.arange(12.0).as_strided((1, 3), (100000, 2)),
    "channels-last": lambda: torch.arange(120.0).reshape(1, 4, 5, 6).to(memory_format=torch.channels_last),
    "leading-one": lambda: torch.arange(576.0 * 8).reshape(1, 576, 8),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_honoured(tmp_path, name):
    tensor = VIEWS[name]()
    torch.save(tensor, tmp_path / "t.pt")
    _same(read_tensor(tmp_path / "t.pt"), tensor)


def test_parameters_read_like_tensors(tmp_path):
    parameter = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    torch.save(parameter, tmp_path / "p.pt")
    torch.save(parameter.detach().requires_grad_(), tmp_path / "g.pt")
    _same(read_tensor(tmp_path / "p.pt"), parameter)
    _same(read_tensor(tmp_path / "g.pt"), parameter)


def test_other_pickle_protocols_and_big_endian(tmp_path):
    tensor = torch.arange(12.0).reshape(3, 4)
    for protocol in (2, 3, 4, 5):
        torch.save(tensor, tmp_path / "t.pt", pickle_protocol=protocol)
        _same(read_tensor(tmp_path / "t.pt"), tensor)
    source = zipfile.ZipFile(tmp_path / "t.pt")
    with zipfile.ZipFile(tmp_path / "big.pt", "w") as swapped:
        for name in source.namelist():
            data = source.read(name)
            data = b"big" if name.endswith("byteorder") else data
            data = np.frombuffer(data, "<f4").astype(">f4").tobytes() if name.endswith("data/0") else data
            swapped.writestr(name, data)
    _same(read_tensor(tmp_path / "big.pt"), tensor)


WRITTEN = ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]


@pytest.mark.parametrize("dtype", WRITTEN)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (0, 4), (576, 3), (1, 300, 2)], ids=str)
def test_torch_reads_what_we_write(tmp_path, dtype, shape):
    array = np.arange(int(np.prod(shape))).reshape(shape).astype(dtype)
    write_tensor(tmp_path / "t.pt", array)
    for mmap in (False, True):
        tensor = torch.load(tmp_path / "t.pt", weights_only=True, mmap=mmap)
        assert tensor.is_contiguous()
        assert tensor.numpy().dtype == array.dtype
        assert tuple(tensor.shape) == shape
        np.testing.assert_array_equal(tensor.numpy(), array)
    back = read_tensor(tmp_path / "t.pt")
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(back, array)


def test_writes_non_contiguous_and_big_endian_arrays(tmp_path):
    array = np.arange(24, dtype=">f4").reshape(4, 6).T[::2]
    write_tensor(tmp_path / "t.pt", array)
    np.testing.assert_array_equal(torch.load(tmp_path / "t.pt", weights_only=True).numpy(), array.astype("<f4"))


def test_large_numbers_of_elements(tmp_path):
    for count in (255, 256, 65535, 65536, 70001):
        write_tensor(tmp_path / "t.pt", np.arange(count, dtype=np.uint8))
        assert torch.load(tmp_path / "t.pt", weights_only=True).shape == (count,)
        assert read_tensor(tmp_path / "t.pt").shape == (count,)


def test_bytes_are_deterministic_stored_and_aligned(tmp_path):
    array = np.arange(100, dtype=np.float32)
    write_tensor(tmp_path / "a.pt", array)
    write_tensor(tmp_path / "b.pt", array)
    data = (tmp_path / "a.pt").read_bytes()
    assert data == (tmp_path / "b.pt").read_bytes()
    assert data.index(array.tobytes()) % 64 == 0
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert archive.testzip() is None
        assert {i.compress_type for i in archive.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize("array", [np.zeros(2, "c8"), np.array(["a"]), np.array([None]), np.zeros(2, "u4")], ids=str)
def test_refuses_to_write_other_dtypes(tmp_path, array):
    with pytest.raises(FeatureFileError, match="dtype"):
        write_tensor(tmp_path / "t.pt", array)
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "dict": (lambda: {"feat": torch.ones(2), "n": 1}, r"dict with keys \['feat', 'n'\]"),
    "state-dict": (lambda: torch.nn.Linear(2, 2).state_dict(), r"dict with keys \['weight', 'bias'\]"),
    "list": (lambda: [torch.ones(2)], "a list of 1"),
    "number": (lambda: 3, "holds 3"),
    "complex": (lambda: torch.ones(2, dtype=torch.complex64), "ComplexFloatStorage"),
    "uint16": (lambda: torch.ones(2, dtype=torch.uint16), "_rebuild_tensor_v3"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "_rebuild_sparse_tensor"),
    "numpy": (lambda: np.ones(3), "numpy object"),
    "module": (lambda: torch.nn.Linear(1, 1), r"torch\.nn\.modules"),
    "nine-dims": (lambda: torch.ones([1] * 9), "shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_anything_but_one_tensor(tmp_path, name):
    make, words = REFUSED[name]
    torch.save(make(), tmp_path / "t.pt")
    with pytest.raises(FeatureFileError, match=words) as caught:
        read_tensor(tmp_path / "t.pt")
    assert "\n" not in str(caught.value)
    assert "save" in str(caught.value)


def test_names_the_legacy_format(tmp_path):
    torch.save(torch.ones(2), tmp_path / "t.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(FeatureFileError, match=r"torch < 1\.6.*re-save"):
        read_tensor(tmp_path / "t.pt")


def test_does_not_import_torch():
    code = (
        "import sys, wsi_rt.runtime.features as f; f.read_tensor; "
        "print(sorted({'torch', 'h5py', 'onnxruntime'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
