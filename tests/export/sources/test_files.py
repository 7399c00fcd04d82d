"""Which files of a folder are read, and what an index, a clone without LFS or a damaged value are refused for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
save_file = pytest.importorskip("safetensors.torch", reason="the export extra is not installed").save_file

from wsi_rt.export.build import BuildRequest, build_engines, plan_build  # noqa: E402
from wsi_rt.export.sources.checkpoint import Sources, resolve  # noqa: E402
from wsi_rt.export.sources.files import open_weights  # noqa: E402
from wsi_rt.runtime.errors import CheckpointError, InputError  # noqa: E402

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9876543210\n"


def put(path: Path, **tensors: float) -> None:
    """One-element tensors, in the format of the suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = {name: torch.tensor([float(value)]) for name, value in tensors.items()}
    save_file(data, str(path)) if path.suffix == ".safetensors" else torch.save(data, path)


def put_index(path: Path, weight_map: dict[str, str]) -> None:
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def read(path: Path, **options: str) -> dict[str, float]:
    source = open_weights(path, **options)
    return {name: float(source.get(name)[0]) for name in source.shapes()}


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["model.safetensors", "pytorch_model.bin"], "model.safetensors"),
        (["other.safetensors", "pytorch_model.bin"], "other.safetensors"),
        (["model.safetensors", "other.safetensors"], "model.safetensors"),
        (["pytorch_model.bin", "mm_projector.bin", "slide_encoder.pth"], "pytorch_model.bin"),
        (["mm_projector.bin", "training_args.bin", "optimizer.pt", "rng_state_0.pth"], "mm_projector.bin"),
        (["slide_encoder.pth"], "slide_encoder.pth"),
        (["weights.pt"], "weights.pt"),
    ],
    ids=lambda x: "+".join(x) if isinstance(x, list) else "",
)
def test_which_file_of_a_folder(tmp_path, files, chosen):
    for i, name in enumerate(files):
        put(tmp_path / name, x=i)
    assert read(tmp_path) == {"x": files.index(chosen)}
    assert read(tmp_path / chosen) == {"x": files.index(chosen)}


@pytest.mark.parametrize("other", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_gigapaths_repository_holds_two_encoders(tmp_path, other, suffix):
    put(tmp_path / other, tile=1)
    put(tmp_path / f"slide_encoder{suffix}", slide=2)
    assert read(tmp_path, prefer="slide_encoder") == {"slide": 2}
    assert read(tmp_path) == ({"slide": 2} if (suffix, other) == (".safetensors", "pytorch_model.bin") else {"tile": 1})


def same(checkpoint, parts) -> bool:
    """Whether the parts hold the checkpoint's tensors, every one."""
    return all(
        np.array_equal(parts[component].source.get(name), x)
        for component in parts
        for name, x in checkpoint.tensors[component].items()
    )


@pytest.mark.parametrize("wrapper", ["model", None])
def test_gigapaths_repository_as_both_encoders(checkpoint, tmp_path, wrapper):
    """config.json (timm's), pytorch_model.bin and slide_encoder.pth in one folder, given twice; or its file."""
    folder = tmp_path / "prov-gigapath"
    folder.mkdir()
    (folder / "config.json").write_bytes((checkpoint.tile / "config.json").read_bytes())
    tile, slide = (
        {n: torch.from_numpy(x) for n, x in checkpoint.tensors[c].items()} for c in ("tile_encoder", "slide_encoder")
    )
    torch.save(tile, folder / "pytorch_model.bin")
    torch.save({wrapper: slide} if wrapper else slide, folder / "slide_encoder.pth")
    for given in (folder, folder / "slide_encoder.pth"):
        parts = resolve(Sources(tile_encoder=str(folder), slide_encoder=str(given))).parts
        assert set(parts) == {"tile_encoder", "slide_encoder"}
        assert same(checkpoint, parts)


@pytest.mark.parametrize("prefix", ["model.", ""], ids=["model", "bare"])
@pytest.mark.parametrize("place", ["folder", "file"])
def test_a_projector_of_torch_save_over_a_base(checkpoint, tmp_path, place, prefix):
    """LLaVA's stage 2 saves mm_projector.bin, with training's own files around it."""
    folder = tmp_path / "stage2"
    folder.mkdir()
    tensors = {
        prefix + n.removeprefix("model."): torch.from_numpy(x) for n, x in checkpoint.tensors["projector"].items()
    }
    torch.save(tensors, folder / "mm_projector.bin")
    torch.save({"lr": 1}, folder / "training_args.bin")
    checkpoint.write_base(tmp_path / "base", model_type="llama")
    given = folder if place == "folder" else folder / "mm_projector.bin"
    resolved = resolve(Sources(llava=str(given), llava_base=str(tmp_path / "base")))
    assert same(checkpoint, resolved.parts)
    assert resolved.tokenizer == tmp_path / "base"


def test_a_base_alone_is_no_checkpoint(checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match=r"--llava-base base needs --llava"):
        resolve(Sources(slide_encoder=str(checkpoint.slide), llava_base="base"))


def test_the_base_of_a_folder_goes_with_the_folders_own_adapter(checkpoint, tmp_path):
    """A --llava beside --checkpoint is whole, or names its own base."""
    whole = checkpoint.llava.rename(checkpoint.root / "whole")
    checkpoint.save(checkpoint.llava / "mm_projector.safetensors", checkpoint.tensors["projector"])
    checkpoint.write_base(checkpoint.root / "llava_base", model_type="llama")
    own = resolve(Sources(checkpoint=str(checkpoint.root))).parts["llm"].source.label
    assert own == f"{checkpoint.llava} + {checkpoint.root / 'llava_base'}"
    given = resolve(Sources(checkpoint=str(checkpoint.root), llava=str(whole))).parts["llm"].source.label
    assert given == str(whole)


@pytest.mark.parametrize("suffix", [".bin", ".pth"])
def test_several_torch_files_without_an_index(tmp_path, suffix):
    for name in ("a", "b"):
        put(tmp_path / f"{name}{suffix}", x=1)
    with pytest.raises(CheckpointError, match=rf"2 .bin files \(a{suffix}, b{suffix}\), expected pytorch_model.bin"):
        open_weights(tmp_path)


def test_no_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no weights, expected model.safetensors, pytorch_model.bin"):
        open_weights(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"config.json: not known as a file of weights, expected .safetensors, .bin"
    ):
        open_weights(tmp_path / "config.json")


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
class TestIndex:
    """Shards `a` (x) and `b` (y) with an index."""

    @pytest.fixture
    def index(self, tmp_path, suffix) -> Path:
        put(tmp_path / f"a{suffix}", x=1)
        put(tmp_path / f"b{suffix}", y=2)
        stem = "model" if suffix == ".safetensors" else "pytorch_model"
        path = tmp_path / f"{stem}{suffix}.index.json"
        put_index(path, {"x": f"a{suffix}", "y": f"b{suffix}"})
        return path

    def test_shards_are_one_source(self, index):
        assert read(index.parent) == {"x": 1, "y": 2}

    def test_a_shard_is_missing(self, index, suffix):
        (index.parent / f"b{suffix}").unlink()
        with pytest.raises(CheckpointError, match=rf"shard b{suffix} is missing \(1 of 2\)"):
            open_weights(index.parent)

    def test_a_tensor_that_its_shard_lacks(self, index, suffix):
        put_index(index, {"x": f"a{suffix}", "y": f"b{suffix}", "z": f"b{suffix}"})
        with pytest.raises(CheckpointError, match=rf"puts z into b{suffix}, which lacks it \(1 tensors"):
            open_weights(index.parent)

    def test_a_tensor_in_another_shard(self, index, suffix):
        put_index(index, {"x": f"b{suffix}", "y": f"a{suffix}"})
        with pytest.raises(CheckpointError, match=rf"puts x into b{suffix}, which lacks it \(2 tensors"):
            open_weights(index.parent)

    def test_a_tensor_listed_twice(self, index, suffix):
        index.write_text(f'{{"weight_map": {{"x": "a{suffix}", "y": "b{suffix}", "x": "b{suffix}"}}}}')
        with pytest.raises(CheckpointError, match=r"x is listed twice"):
            open_weights(index.parent)

    def test_a_tensor_in_two_shards(self, index, suffix):
        put(index.parent / f"b{suffix}", y=2, x=3)
        with pytest.raises(CheckpointError, match=rf"b{suffix}: tensor x stands in a{suffix} too"):
            open_weights(index.parent)

    @pytest.mark.parametrize("name", ["../a", "/etc/a", "sub/a", "..\\a", "a\0", "\ud800", "x" * 5000], ids=ascii)
    def test_a_shard_elsewhere(self, index, suffix, name):
        put_index(index, {"x": f"{name}{suffix}", "y": f"b{suffix}"})
        with pytest.raises(CheckpointError) as e:
            open_weights(index.parent)
        told = repr(name + suffix if len(name) < 80 else "x" * 77 + "...")
        assert f"{index}: shard {told} is no file beside it" in str(e.value)

    @pytest.mark.parametrize("name", ["..", ".", ""])
    def test_a_folder_for_a_shard(self, index, suffix, name):
        put_index(index, {"x": name, "y": f"b{suffix}"})
        with pytest.raises(CheckpointError, match=rf"shard '{name}' is no file beside it"):
            open_weights(index.parent)

    def test_an_empty_index(self, index, suffix):
        put_index(index, {})
        with pytest.raises(CheckpointError, match=rf"{index.name}: its `weight_map` is empty, expected tensors"):
            open_weights(index.parent)

    @pytest.mark.parametrize("change", ["replaced", "truncated", "touched", "gone", "garbage"])
    @pytest.mark.parametrize("step", ["get", "digest"])
    def test_a_shard_that_changes_while_it_is_read(self, index, suffix, change, step):
        """Between planning and building, or while it builds."""
        source, path = open_weights(index.parent), index.parent / f"b{suffix}"
        assert source.get("y")[0] == 2
        data, stat = path.read_bytes(), path.stat()
        if change == "gone":
            path.unlink()
        elif change == "replaced":
            put(path, y=3)
        else:
            path.write_bytes({"truncated": data[:-8], "touched": data, "garbage": b"x" * len(data)}[change])
        if path.exists():  # a file system's clock may be as coarse as 10 ms
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10_000_000))
        with pytest.raises(CheckpointError, match=rf"b{suffix}: changed while it was read"):
            source.get("y") if step == "get" else source.digest()

    def test_a_shard_that_changes_after_it_is_hashed(self, index, suffix):
        source = open_weights(index.parent)
        assert source.digest() == source.digest()
        with (index.parent / f"a{suffix}").open("ab") as f:
            f.write(b"more")
        assert source.get("y")[0] == 2
        with pytest.raises(CheckpointError, match=rf"a{suffix}: changed while it was read"):
            source.get("x")

    def test_what_a_library_says_of_a_file_is_one_error(self, index, suffix):
        """Damage that neither size nor time of change shows."""
        source, path = open_weights(index.parent), index.parent / f"b{suffix}"
        stat = path.stat()
        data = path.read_bytes().replace(b"y", b"z", 1) if suffix == ".safetensors" else b"x" * stat.st_size
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        with pytest.raises(
            CheckpointError, match=rf"b{suffix}: (tensor y is not readable|not a readable PyTorch file)"
        ):
            source.get("y")

    def test_the_single_file_comes_first(self, index, suffix):
        put(index.parent / index.name.removesuffix(".index.json"), x=5, y=6)
        assert read(index.parent) == {"x": 5, "y": 6}

    def test_a_foreign_index_beside_it(self, index, suffix):
        other = index.with_name(f"other{suffix}.index.json")
        put_index(other, {"x": "nowhere"})
        assert read(index.parent) == {"x": 1, "y": 2}
        index.rename(index.with_name(f"third{suffix}.index.json"))
        with pytest.raises(CheckpointError, match=r"several indices of shards"):
            open_weights(index.parent)


def test_a_safetensors_header_that_promises_more_than_the_file(tmp_path):
    put(tmp_path / "model.safetensors", x=1)
    data = (tmp_path / "model.safetensors").read_bytes()
    grown = data.replace(b'"shape":[1],"data_offsets":[0,4]', b'"shape":[9],"data_offsets":[0,36]')
    length = int.from_bytes(data[:8], "little") + len(grown) - len(data)
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + grown[8:])
    with pytest.raises(CheckpointError, match=r"not a readable safetensors file .*; download it again"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "tile_encoder/model.safetensors",
        "tile_encoder/config.json",
        "slide_encoder/slide_encoder.safetensors",
        "llava/model-00001-of-00002.safetensors",
        "llava/model.safetensors.index.json",
        "llava/config.json",
        "llava/tokenizer.json",
    ],
)
def test_git_lfs_pointers_are_named(checkpoint, name):
    """A clone without LFS leaves 130 bytes of text in place of every large file."""
    (checkpoint.root / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=r"a Git LFS pointer, .* `git lfs pull`") as e:
        resolve(Sources(checkpoint=str(checkpoint.root)))
    assert str(checkpoint.root / name) in str(e.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "slide_encoder.pth"])
def test_git_lfs_pointers_of_torch_files(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    with pytest.raises(CheckpointError, match=rf"{name}: a Git LFS pointer"):
        open_weights(tmp_path)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path, suffix, bad):
    x = torch.ones(5, 4)
    x[1, 2] = x[3, 3] = bad
    data = {"fine": torch.full((3,), 3e38), "damaged": x}  # a sum beyond fp32 is no damage
    save_file(data, str(tmp_path / "w.safetensors")) if suffix == ".safetensors" else torch.save(
        data, tmp_path / "w.bin"
    )
    source = open_weights(tmp_path)
    assert np.isfinite(source.get("fine")).all()
    with pytest.raises(CheckpointError, match=rf"w{suffix}: 2 of the 20 values of damaged are not finite"):
        source.get("damaged")


def test_infinities_that_cancel(tmp_path):
    torch.save({"x": torch.tensor([np.inf, -np.inf, 1.0])}, tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match=r"2 of the 3 values of x"):
        open_weights(tmp_path).get("x")


def test_fp64_beyond_fp32(tmp_path):
    torch.save({"x": torch.tensor([1e300, 1.0], dtype=torch.float64)}, tmp_path / "w.bin")
    with pytest.raises(CheckpointError, match=r"1 of the 2 values of x"):
        open_weights(tmp_path).get("x")


def test_a_build_from_damaged_weights_leaves_nothing(checkpoint, tmp_path):
    checkpoint.tensors["llm"]["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    checkpoint.write_llava()
    plan = plan_build(BuildRequest(Sources(llava=str(checkpoint.llava)), tmp_path / "bundle"))
    with pytest.raises(InputError, match=r"1 of the 6144 values of model.layers.1.mlp.up_proj.weight are not finite"):
        build_engines(plan)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]
