"""`.bin`, `.pth` and `.pt` files: read tensor by tensor without running anything of theirs, or refused in one line."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch", reason="the export extra is not installed")

from wsi_rt.export.sources import torch_file  # noqa: E402
from wsi_rt.export.sources.files import open_weights  # noqa: E402
from wsi_rt.export.sources.weights import WeightSource  # noqa: E402
from wsi_rt.runtime.errors import CheckpointError  # noqa: E402
from wsi_rt.runtime.hashing import sha256_file  # noqa: E402

FORMATS = {"zip": True, "legacy": False}


def tensors() -> dict[str, torch.Tensor]:
    """Whole, strided, shared, parameters, without elements, scalar."""
    x = torch.linspace(-3, 3, 60).reshape(5, 12)
    return {
        "whole": x.clone(),
        "strided": x.t()[::2],
        "first_half": x[:2],  # shares its storage with the next
        "second_half": x[2:],
        "parameter": torch.nn.Parameter(torch.arange(7.0)),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }


def saved(data: Any, container: str = "zip") -> bytes:
    buffer = io.BytesIO()
    torch.save(data, buffer, _use_new_zipfile_serialization=FORMATS[container])
    return buffer.getvalue()


def equals(source: WeightSource, expected: dict[str, torch.Tensor]) -> bool:
    wanted = {n: t.detach().float().numpy() for n, t in expected.items()}
    return source.shapes() == {n: x.shape for n, x in wanted.items()} and all(
        np.array_equal(source.get(n), x) for n, x in wanted.items()
    )


def refused(path: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as e:
        open_weights(path)
    message = str(e.value)
    assert [w for w in (str(path), *words) if w not in message] == [], message
    assert "\n" not in message
    assert len(message) < 600


@pytest.mark.parametrize("suffix", [".bin", ".pth", ".pt"])
@pytest.mark.parametrize("container", FORMATS)
def test_every_kind_of_tensor(tmp_path, container, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(saved(tensors(), container))
    source = open_weights(path)
    assert equals(source, tensors())
    assert equals(source, tensors()), "a second time"
    x = source.get("whole")
    x += 1
    assert equals(source, tensors()), "what a caller changes stays his"
    assert ("one whole file in memory" in source.label) == (container == "legacy")


@pytest.mark.parametrize("container", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_precision_is_given_as_fp32(tmp_path, dtype, container):
    x = torch.linspace(-1, 1, 33, dtype=torch.float64).to(getattr(torch, dtype))
    path = tmp_path / "weights.bin"
    path.write_bytes(saved({"x": x}, container))
    given = open_weights(path).get("x")
    assert given.dtype == np.float32
    assert np.array_equal(given, x.float().numpy())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: {"model": t},
        lambda t: {"state_dict": t, "epoch": 3, "optimizer": {"lr": 0.1}},
        lambda t: {"module": t},
        lambda t: {"epoch": 3, "model": {"state_dict": t}},
        lambda t: {f"module.{n}": x for n, x in t.items()},
        lambda t: {"model": {f"module.{n}": x for n, x in t.items()}},
    ],
    ids=["model", "state_dict", "module", "nested", "data-parallel", "model-data-parallel"],
)
def test_known_wrappers(tmp_path, wrap):
    path = tmp_path / "weights.pth"
    path.write_bytes(saved(wrap(tensors())))
    assert equals(open_weights(path), tensors())


def test_a_tensor_called_model_is_no_wrapper(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(saved({"model": torch.ones(2), "module.x": torch.ones(3)}))
    assert open_weights(path).shapes() == {"model": (2,), "module.x": (3,)}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, ["holds nothing"]),
        ({"model": {}}, ["holds nothing"]),
        ([torch.ones(1)], ["holds a list"]),
        (torch.ones(1), ["holds a Tensor"]),
        ({"w": torch.ones(1), "step": 3}, ["1 of 2 entries are no tensors (step; the first is a int)"]),
        ({"w": {"deep": torch.ones(1)}}, ["1 of 1 entries", "w; the first is a dict"]),
        ({3: torch.ones(1)}, ["entries are no tensors (3;"]),
        ({"w": torch.ones(2).to_sparse()}, ["1 tensors are without data or sparse (w)"]),
        ({"w": torch.empty(2, device="meta")}, ["1 tensors are without data or sparse (w)"]),
    ],
    ids=["empty", "empty-model", "list", "tensor", "number", "nested", "number-name", "sparse", "meta"],
)
def test_what_is_no_state_dict(tmp_path, data, words):
    path = tmp_path / "weights.pth"
    path.write_bytes(saved(data))
    refused(path, *words)


def test_a_dict_that_holds_itself_ends(tmp_path):
    data: dict[str, Any] = {"w": torch.ones(1)}
    data["model"] = data
    (tmp_path / "weights.pth").write_bytes(saved(data))
    refused(tmp_path / "weights.pth", "entries are no tensors (model;")


class Payload:
    """Its unpickling writes a file, where anything runs it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("container", [*FORMATS, "pickle"])
@pytest.mark.parametrize("where", ["alone", "beside"])
def test_code_is_never_run(tmp_path, container, where):
    canary, path = tmp_path / "canary", tmp_path / "weights.bin"
    data = Payload(canary) if where == "alone" else {"w": torch.ones(2), "x": Payload(canary)}
    path.write_bytes(pickle.dumps(data) if container == "pickle" else saved(data, container))
    if container == "zip":  # the canary sings where code runs
        torch.load(path, weights_only=False)
        assert canary.is_file()
        canary.unlink()
    refused(path, "not", "expected tensors only" if container == "zip" else "")
    assert not canary.exists()


def test_a_training_scripts_settings_are_named(tmp_path):
    import argparse

    (tmp_path / "weights.pth").write_bytes(saved({"model": tensors(), "args": argparse.Namespace(lr=1)}))
    refused(tmp_path / "weights.pth", "argparse.Namespace", "not run", "save the state dict alone")


def test_quantised_tensors_are_refused_when_read(tmp_path):
    (tmp_path / "weights.bin").write_bytes(saved({"w": torch.ones(2, dtype=torch.int8), "v": torch.ones(2)}))
    source = open_weights(tmp_path / "weights.bin")
    assert source.get("v").tolist() == [1, 1]
    with pytest.raises(CheckpointError, match=r"weights.bin: tensor w is int8, expected fp32, fp16, bf16 or fp64"):
        source.get("w")


def outcome(path: Path, data: bytes) -> str:
    """How reading `data` ends: "refused", "equal", "other" values or "shapes"; any other exception passes."""
    path.write_bytes(data)
    with contextlib.suppress(CheckpointError):
        source = open_weights(path)
        if source.shapes() != {n: tuple(t.shape) for n, t in tensors().items()}:
            return "shapes"
        return "equal" if equals(source, tensors()) else "other"
    return "refused"


def safetensors_bytes() -> bytes:
    save = pytest.importorskip("safetensors.torch", reason="the export extra is not installed").save
    return save({n: t.detach().contiguous().clone() for n, t in tensors().items()})


WHOLE = {".bin": lambda: saved(tensors()), ".pth": lambda: saved({"model": tensors()}, "legacy")}
WHOLE[".safetensors"] = safetensors_bytes


@pytest.mark.parametrize("suffix", WHOLE)
def test_truncated_at_any_place(tmp_path, suffix):
    """Every class of prefix: none, less than the magic number, headers, between tensors, one byte short."""
    whole = WHOLE[suffix]()
    path = tmp_path / f"weights{suffix}"
    edges = [*range(24), len(whole) // 2, *(len(whole) - n for n in (200, 100, 23, 22, 21, 8, 2, 1))]
    steps = range(24, len(whole), max(1, len(whole) // 150))
    ends = {n: outcome(path, whole[:n]) for n in sorted({*edges, *steps})}
    assert {n: end for n, end in ends.items() if end not in ("refused", "equal")} == {}
    assert ends[len(whole) // 2] == "refused"
    assert outcome(path, whole) == "equal"


@pytest.mark.parametrize("suffix", WHOLE)
def test_damaged_at_any_place(tmp_path_factory, suffix):
    """A wrong byte may change a value, which only a digest can tell; it never ends in another exception."""
    whole = WHOLE[suffix]()
    path = tmp_path_factory.mktemp("damaged") / f"weights{suffix}"

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(st.integers(0, len(whole) - 1), st.integers(1, 255))
    def damage(at: int, change: int) -> None:
        assert outcome(path, whole[:at] + bytes([whole[at] ^ change]) + whole[at + 1 :])

    damage()


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"\x80\x02}q\x00.", b"not weights at all\n", b"\x00" * 4096])
def test_other_files(tmp_path, data):
    (tmp_path / "weights.bin").write_bytes(data)
    refused(tmp_path / "weights.bin")


def test_a_mapping_is_renewed_before_it_grows(tmp_path, monkeypatch):
    """What was read of a mapping counts as memory until it is dropped."""
    loads = []
    real = torch_file._unpickle
    monkeypatch.setattr(torch_file, "_unpickle", lambda *a: loads.append(a) or real(*a))
    monkeypatch.setattr(torch_file, "_MAPPED_BYTES", 1000)
    (tmp_path / "weights.bin").write_bytes(saved({f"w{i}": torch.full((100,), float(i)) for i in range(10)}))
    source = open_weights(tmp_path / "weights.bin")
    assert [source.get(f"w{i}")[0] for i in range(10)] == list(range(10))
    assert len(loads) == 1 + 4  # for the names, then after every third tensor of 400 bytes


READ_ALL = """
import sys, torch
from pathlib import Path
from wsi_rt.export.sources.files import open_weights
def peak():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) * 1024
torch.ones(1).sum()
before = peak()
source = open_weights(Path(sys.argv[1]))
for name in source.shapes():
    source.get(name)
print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    """1.2 GB in shards of 20 MB tensors: 128 MB of a mapping, a few tensors, what malloc keeps; half the file."""
    import json

    weight_map = {}
    for shard in ("a", "b"):
        name = f"pytorch_model-{shard}.bin"
        torch.save({f"{shard}{i}": torch.ones(5_000_000) for i in range(30)}, tmp_path / name)
        weight_map |= {f"{shard}{i}": name for i in range(30)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    done = subprocess.run([sys.executable, "-c", READ_ALL, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 600e6


# Checksums


def flipped(path: Path, at: int) -> None:
    """One bit of one byte, lowest of an fp32's mantissa where it is one."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("record", ["data/0", "data/1", "data.pkl", "version"])
def test_a_flipped_bit_is_found_with_the_digest(tmp_path, record):
    path = tmp_path / "weights.bin"
    torch.save({"a": torch.linspace(0, 1, 3000), "b": torch.ones(5)}, path)
    source, name = open_weights(path), f"weights/{record}"
    with zipfile.ZipFile(path) as z:
        content, after = z.read(name), z.getinfo(name).header_offset + 30 + len(name)
    whole = source.digest()
    assert whole == hashlib.sha256(hashlib.sha256(path.read_bytes()).hexdigest().encode()).hexdigest()
    pristine = path.read_bytes()
    flipped(path, pristine.index(content, after) + len(content) // 2 // 4 * 4)
    with pytest.raises(CheckpointError) as e:  # of the pickle, torch may say it first
        open_weights(path).digest()
    if record != "data.pkl":
        assert f"{path}: record {name} does not have the checksum stored with it" in str(e.value)
    path.write_bytes(pristine)
    assert open_weights(path).digest() == whole


def test_any_flipped_bit_is_refused_or_without_effect(tmp_path_factory):
    path = tmp_path_factory.mktemp("flipped") / "weights.bin"
    whole = saved(tensors())

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.integers(0, len(whole) * 8 - 1))
    def flip(bit: int) -> None:
        path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
        with contextlib.suppress(CheckpointError):
            source = open_weights(path)
            same = equals(source, tensors())
            source.digest()
            assert same

    flip()


def test_archives_without_checksums_are_read(tmp_path):
    """torch.save can be told to leave them out; it writes zeros then."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"a": torch.ones(5)}, tmp_path / "weights.bin")
    finally:
        torch.serialization.set_crc32_options(before)
    assert len(open_weights(tmp_path / "weights.bin").digest()) == 64


def test_a_compressed_archive_is_refused(tmp_path):
    """Mapped, its bytes would be taken for numbers."""
    torch.save({"a": torch.arange(1000.0)}, tmp_path / "stored.bin")
    with (
        zipfile.ZipFile(tmp_path / "stored.bin") as stored,
        zipfile.ZipFile(tmp_path / "weights.bin", "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for info in stored.infolist():
            out.writestr(info.filename, stored.read(info))
    refused(tmp_path / "weights.bin", "not a readable PyTorch file")


def test_checking_needs_no_more_memory_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_file, "_READ_BYTES", 1000)
    torch.save({"a": torch.linspace(0, 1, 3000)}, tmp_path / "weights.bin")
    sizes: list[int] = []
    real = torch_file.zlib.crc32
    monkeypatch.setattr(torch_file.zlib, "crc32", lambda x, crc=0: sizes.append(len(x)) or real(x, crc))
    whole = open_weights(tmp_path / "weights.bin").digest()
    assert whole == hashlib.sha256(sha256_file(tmp_path / "weights.bin").encode()).hexdigest()
    assert max(sizes) == 1000
    assert len(sizes) > 12
