"""Opening a bundle: intact files open fast, anything else is named with the command that rebuilds."""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")

from wsi_rt.export.build import BuildRequest, build_engines, plan_build
from wsi_rt.export.sources.checkpoint import Sources
from wsi_rt.runtime import bundle as bundle_module
from wsi_rt.runtime.bundle import STAMP_NAME, Bundle
from wsi_rt.runtime.errors import EngineMismatchError, InputError
from wsi_rt.runtime.hashing import sha256_json
from wsi_rt.runtime.manifest import READS, SCHEMA, load_manifest

REBUILD = "wsi-rt build-engines --checkpoint 'synthetic:nano?seed=3' --components projector --out {} --force"
REBUILD_ALL = "wsi-rt build-engines --checkpoint 'synthetic:nano?seed=3' --out {} --force"
VICTIMS = ["projector/model.onnx", "projector/weights.data", "projector/ort-cpu/model.onnx", "projector/check.npz"]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template") / "bundle"
    sources = Sources(checkpoint="synthetic:nano?seed=3")
    build_engines(plan_build(BuildRequest(sources, root, components=("projector",), threads=1)))
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    """A copy that kept its mtimes, as a bundle that was moved has."""
    return shutil.copytree(template, tmp_path / "bundle", copy_function=shutil.copy2)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed."""
    names: list[str] = []
    sha256_file = bundle_module.sha256_file
    monkeypatch.setattr(bundle_module, "sha256_file", lambda p: names.append(p.name) or sha256_file(p))
    return names


def edit(path: Path, keep_mtime: bool = False) -> None:
    """One bit flips: same size, other bytes."""
    stat = path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    ns = stat.st_mtime_ns if keep_mtime else stat.st_mtime_ns + 1
    os.utime(path, ns=(stat.st_atime_ns, ns))


def edit_manifest(root: Path, sign: bool = False, **changes: object) -> None:
    path = root / "manifest.json"
    data = json.loads(path.read_text())
    data |= changes
    if sign:
        del data["digest"]
        data["digest"] = sha256_json(data)
    path.write_text(json.dumps(data))


def test_an_intact_bundle_opens_without_hashing(root, hashed):
    bundle = Bundle.open(root, threads=1)
    assert hashed == []
    assert set(bundle.manifest.components) == {"projector"}
    with bundle.engine("projector") as engine:
        assert engine.run({"tokens": np.zeros((2, 1024), np.float32)})["embeds"].shape == (2, 256)
    bundle.verify_files()
    assert len(hashed) == len(bundle.manifest.files)


def test_what_opening_does_not_import(template):
    """A bundle opens and runs without torch, transformers or onnx."""
    code = (
        "import sys, numpy\n"
        "from wsi_rt.runtime.bundle import Bundle\n"
        "engine = Bundle.open(sys.argv[1], threads=1).engine('projector')\n"
        "engine.run({'tokens': numpy.zeros((1, 1024), numpy.float32)})\n"
        "print({'torch', 'transformers', 'onnx', 'timm'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(template)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", VICTIMS)
def test_an_edited_file_is_refused_at_open(root, name):
    edit(root / name)
    with pytest.raises(EngineMismatchError) as e:
        Bundle.open(root)
    assert str(root / name) in str(e.value)
    assert "edited after the build" in str(e.value)
    assert REBUILD.format(root) in str(e.value)
    assert e.value.exit_code == 4


@pytest.mark.parametrize("name", VICTIMS)
def test_an_edit_that_hides_its_mtime_is_caught_by_verify(root, name):
    edit(root / name, keep_mtime=True)
    bundle = Bundle.open(root)
    with pytest.raises(EngineMismatchError, match=r"edited after the build \(digest differs\); rebuild: wsi-rt"):
        bundle.verify_files()


@pytest.mark.parametrize("name", VICTIMS)
def test_an_edit_while_the_bundle_is_open_is_caught_by_verify(root, name):
    bundle = Bundle.open(root)
    edit(root / name)
    with pytest.raises(EngineMismatchError, match="edited after the build"):
        bundle.verify_files()


@pytest.mark.parametrize("name", VICTIMS)
def test_another_size_is_refused(root, name):
    with (root / name).open("ab") as f:
        f.write(b"\0")
    size = (root / name).stat().st_size
    with pytest.raises(
        EngineMismatchError, match=rf"{name}: {size} bytes, the manifest says {size - 1}; rebuild: wsi-rt"
    ):
        Bundle.open(root)


@pytest.mark.parametrize("name", VICTIMS)
def test_a_missing_file_is_named(root, name):
    (root / name).unlink()
    with pytest.raises(EngineMismatchError, match=rf"{name}: missing from the bundle; rebuild: wsi-rt build-engines"):
        Bundle.open(root)


def test_a_failed_open_leaves_the_stamp_alone(root):
    """Refused today, refused tomorrow: the edited file never gets into the stamp."""
    before = (root / STAMP_NAME).read_bytes()
    edit(root / VICTIMS[0])
    for _ in range(2):
        with pytest.raises(EngineMismatchError):
            Bundle.open(root)
        assert (root / STAMP_NAME).read_bytes() == before


@pytest.mark.parametrize("stamp", [None, "", "{", "[]", '{"projector/model.onnx": 3}', '{"projector/model.onnx": []}'])
def test_a_copied_bundle_is_hashed_once(template, tmp_path, hashed, stamp):
    """Other mtimes, a lost or a damaged stamp: hashed on the first open, stamped, and fast from then on."""
    root = shutil.copytree(template, tmp_path / "copy", copy_function=shutil.copyfile)
    if stamp is None:
        (root / STAMP_NAME).unlink()
    elif stamp:
        (root / STAMP_NAME).write_text(stamp)
    files = load_manifest(root).files
    Bundle.open(root)
    assert len(hashed) == len(files)
    Bundle.open(root)
    assert len(hashed) == len(files)
    edit(root / VICTIMS[0])
    with pytest.raises(EngineMismatchError):
        Bundle.open(root)


def test_only_stale_files_are_hashed_again(root, hashed):
    path = root / VICTIMS[1]
    os.utime(path, (1, 1))
    Bundle.open(root)
    assert hashed == [path.name]


def test_stamps_of_another_bundle_do_not_count(root, hashed):
    """A stamp that says the file is intact, but for another digest than the manifest's, is not believed."""
    stamp = json.loads((root / STAMP_NAME).read_text())
    stamp[VICTIMS[0]][2] = "0" * 64
    (root / STAMP_NAME).write_text(json.dumps(stamp))
    Bundle.open(root)
    assert len(hashed) == 1


@pytest.fixture
def read_only(template: Path) -> Iterator[Path]:
    """A copied bundle in folders this process cannot write to (as another user where we are root)."""
    place = Path(tempfile.mkdtemp(prefix="wsi-rt-read-only-"))
    root = shutil.copytree(template, place / "bundle", copy_function=shutil.copyfile)
    for path in (place, *place.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    uid = os.geteuid()
    try:
        if uid == 0:
            os.seteuid(65534)
        yield root
    finally:
        os.seteuid(uid)
        for path in (place, *place.rglob("*")):
            path.chmod(0o755)
        shutil.rmtree(place)


def test_a_read_only_bundle_works(read_only, hashed):
    """No stamp can be written: every open hashes, nothing else changes, and edits are still caught."""
    assert not os.access(read_only, os.W_OK, effective_ids=True)
    for opened in (1, 2):
        bundle = Bundle.open(read_only, threads=1)
        assert len(hashed) == opened * len(bundle.manifest.files)
        with bundle.engine("projector") as engine:
            engine.run({"tokens": np.zeros((1, 1024), np.float32)})
    bundle.verify_files()
    assert not [p for p in read_only.iterdir() if p.name.startswith(STAMP_NAME + ".")]


@pytest.mark.parametrize(
    ("name", "words", "place"),
    [
        ("an empty one", "a folder without manifest.json", "an empty one"),
        ("none here", "no engine bundle there", "none here"),
        ("file", "no engine bundle there", "file-engines"),
        ("mine", "a folder without manifest.json", "mine/engines"),
        ("taken", "a folder without manifest.json", "taken/engines-2"),
    ],
)
def test_not_a_bundle(tmp_path, wsi_rt, name, words, place):
    """The command that is told builds one as it stands, whatever is in the way."""
    (tmp_path / "an empty one").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "cat.jpg").write_text("cat")
    (tmp_path / "taken" / "engines").mkdir(parents=True)
    with pytest.raises(InputError, match=rf"{words}.*build one: wsi-rt build-engines") as e:
        Bundle.open(tmp_path / name)
    assert e.value.exit_code == 2
    command = shlex.split(str(e.value).partition("build one: ")[2])
    assert command[-2:] == ["--out", str(tmp_path / place)]
    assert wsi_rt(*command[1:], "--components", "projector", "--dry-run").code == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "damaged"),
        ("{", "damaged"),
        ("[]", "damaged"),
        ("null", "damaged"),
        ("{}", "damaged"),
        ('{"digest": "x"}', "damaged"),
        ('{"digest": "x", "schema": "one"}', "damaged"),
        (f'{{"digest": "x", "schema": {SCHEMA}}}', "edited after the build"),
        ("\x00\xff", "damaged"),
    ],
)
def test_a_damaged_manifest(root, text, words):
    (root / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(EngineMismatchError, match=rf"manifest\.json: {words}") as e:
        Bundle.open(root)
    assert str(e.value).endswith(f"from its checkpoint: wsi-rt build-engines --checkpoint SRC --out {root} --force")


def test_a_manifest_of_another_shape(root):
    """Signed and of this schema, but with a component told as an earlier wsi-rt did."""
    components = json.loads((root / "manifest.json").read_text())["components"]
    components["projector"]["engine"] = components["projector"].pop("targets")
    edit_manifest(root, sign=True, components=components)
    with pytest.raises(EngineMismatchError, match=r"not as this wsi-rt writes it \(KeyError.*; rebuild it from"):
        Bundle.open(root)


def test_an_edited_manifest(root):
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["generation"]["temperature"] = 1.0
    edit_manifest(root, **{"generation": manifest["generation"]})
    with pytest.raises(EngineMismatchError, match="edited after the build"):
        Bundle.open(root)


@pytest.mark.parametrize("schema", [0, READS[0] - 1, SCHEMA + 1, 99])
def test_another_schema_says_which_version_reads_it(root, schema):
    edit_manifest(root, sign=True, schema=schema, version="9.8.7")
    with pytest.raises(
        EngineMismatchError, match=rf"schema {schema}, this wsi-rt reads 3 and 4; use the wsi-rt 9\.8\.7, or rebuild"
    ):
        Bundle.open(root)


def test_a_bundle_of_the_schema_before_is_read(root):
    """As schema 3 wrote it: no ONNX beside the engine, no architectures among the settings."""
    data = json.loads((root / "manifest.json").read_text())
    del data["components"]["projector"]["targets"]["ort-cpu"]["source"], data["build"]["sms"]
    del data["digest"]
    data = {**data, "schema": 3}
    (root / "manifest.json").write_text(json.dumps({**data, "digest": sha256_json(data)}))
    bundle = Bundle.open(root, threads=1)
    assert bundle.component("projector").compiled("ort-cpu").source == {}
    assert bundle.manifest.rebuild_command(root) == REBUILD.format(root)
    with bundle.engine("projector") as engine:
        engine.run({"tokens": np.zeros((1, 1024), np.float32)})


def test_another_machine(root):
    components = json.loads((root / "manifest.json").read_text())["components"]
    components["projector"]["targets"]["ort-cpu"]["requires"] = {"isa": "riscv64"}
    edit_manifest(root, sign=True, components=components)
    with pytest.raises(
        EngineMismatchError, match=rf"built for riscv64, this machine is {platform.machine()}; rebuild"
    ) as e:
        Bundle.open(root)
    assert REBUILD.format(root) in str(e.value)


def test_a_component_that_is_not_there(root):
    bundle = Bundle.open(root)
    for open_it in (lambda: bundle.engine("tile_encoder"), bundle.decoder, lambda: bundle.component("tile_encoder")):
        with pytest.raises(
            InputError, match=r"no (tile_encoder|llm) in this bundle \(it has projector\); rebuild: wsi-rt"
        ) as e:
            open_it()
        assert str(e.value).endswith(REBUILD_ALL.format(root))


def test_a_component_that_the_checkpoint_does_not_have(root):
    source = json.loads((root / "manifest.json").read_text())["source"]
    edit_manifest(root, sign=True, source={**source, "components": ["projector"]})
    with pytest.raises(InputError, match=r"its checkpoint, synthetic:nano\?seed=3, has none: build from one that has"):
        Bundle.open(root).engine("llm")
    assert "--components" not in load_manifest(root).rebuild_command(root)


def put_in_place(other: Path, root: Path) -> None:
    """As a build's swap does."""
    root.rename(root.with_name("old"))
    other.rename(root)
    shutil.rmtree(root.with_name("old"))


def test_a_real_rebuild_while_it_is_open(root):
    """Same checkpoint architecture, other weights: nothing of the new bundle is read under the old manifest."""
    bundle = Bundle.open(root, threads=1)
    engine = bundle.engine("projector")
    tokens = {"tokens": np.ones((2, 1024), np.float32)}
    before = engine.run(tokens)["embeds"]
    sources = Sources(checkpoint="synthetic:nano?seed=4")
    build_engines(plan_build(BuildRequest(sources, root, components=("projector",), force=True, threads=1)))
    told = rf"{root}: this bundle was replaced while open; open it again"
    for read in (lambda: bundle.engine("projector"), bundle.decoder, bundle.tokenizer, bundle.verify_files):
        with pytest.raises(EngineMismatchError, match=told) as e:
            read()
        assert e.value.exit_code == 4
    assert np.array_equal(engine.run(tokens)["embeds"], before), "what was open goes on as it was"
    with Bundle.open(root, threads=1).engine("projector") as new:
        assert not np.array_equal(new.run(tokens)["embeds"], before)


def test_the_same_bundle_built_again_counts_as_replaced(root, template):
    bundle = Bundle.open(root)
    put_in_place(shutil.copytree(template, root.with_name("same"), copy_function=shutil.copy2), root)
    with pytest.raises(EngineMismatchError, match="was replaced while open"):
        bundle.engine("projector")


def test_a_bundle_that_is_gone(root):
    bundle = Bundle.open(root)
    shutil.rmtree(root)
    with pytest.raises(EngineMismatchError, match="was replaced while open"):
        bundle.engine("projector")


def swap_before(monkeypatch, owner, name: str, root: Path, template: Path) -> None:
    """Put a copy of the bundle in place whenever `owner.name` is called, just before it runs."""
    other, original = shutil.copytree(template, root.with_name("same")), getattr(owner, name)

    def swap_then_call(argument):
        put_in_place(other, root)
        return original(argument)

    monkeypatch.setattr(owner, name, swap_then_call)


def test_a_swap_while_a_component_is_being_opened(root, template, monkeypatch):
    """After the first look and before the files are read: the mixture is thrown away."""
    bundle = Bundle.open(root)
    swap_before(monkeypatch, bundle, "component", root, template)
    with pytest.raises(EngineMismatchError, match="was replaced while open"):
        bundle.engine("projector")


def test_a_swap_while_the_bundle_is_being_opened(root, template, monkeypatch):
    swap_before(monkeypatch, bundle_module, "_read_stamp", root, template)
    with pytest.raises(EngineMismatchError, match="was replaced while open"):
        Bundle.open(root)


def test_an_edit_during_the_hashing_is_not_stamped(root, monkeypatch):
    """The stamp tells the file that was hashed, so what was written after it is stale."""
    victim, sha256_file = root / VICTIMS[0], bundle_module.sha256_file
    (root / STAMP_NAME).unlink()

    def hash_then_edit(path: Path) -> str:
        digest = sha256_file(path)
        if path == victim:
            edit(path)
        return digest

    with monkeypatch.context() as patched:
        patched.setattr(bundle_module, "sha256_file", hash_then_edit)
        Bundle.open(root)
    assert (root / STAMP_NAME).is_file()
    with pytest.raises(EngineMismatchError, match=f"{victim.name}: edited after the build"):
        Bundle.open(root)


def test_a_bundle_of_two_targets(root):
    """The first that was recorded is the default, whatever its name; each has its own files and its own needs."""
    shutil.copytree(root / "projector" / "ort-cpu", root / "projector" / "tensorrt")
    data = json.loads((root / "manifest.json").read_text())
    compiled = data["components"]["projector"]["targets"]
    graphs = {"model": "projector/tensorrt/model.onnx"}
    compiled["abacus"] = {**compiled["ort-cpu"], "graphs": graphs, "precision": "fp16", "requires": {"sm": "89"}}
    edit_manifest(root, sign=True, components=data["components"], targets=["ort-cpu", "abacus"])
    assert Bundle.open(root).target == "ort-cpu"
    with pytest.raises(EngineMismatchError, match=r"built for sm_89, this machine is .*; rebuild: wsi-rt"):
        Bundle.open(root, target="abacus")
    compiled["abacus"]["requires"] = {}
    edit_manifest(root, sign=True, components=data["components"], targets=["abacus", "ort-cpu"])
    bundle = Bundle.open(root)
    assert bundle.target == "abacus"
    assert bundle.component("projector").compiled("abacus").precision == "fp16"
    with pytest.raises(InputError, match="target is 'abacus', expected one of"):
        bundle.engine("projector")
    with Bundle.open(root, threads=1, target="ort-cpu").engine("projector") as engine:
        engine.run({"tokens": np.zeros((1, 1024), np.float32)})


def test_a_target_that_is_not_in_the_bundle(root):
    with pytest.raises(InputError, match="not built for 'tensorrt-rtx-sm89', expected one of: ort-cpu") as e:
        Bundle.open(root, target="tensorrt-rtx-sm89")
    assert e.value.exit_code == 2


def test_inspect_and_verify_tell_target_and_precision(root, wsi_rt):
    told = wsi_rt("inspect", root).out
    assert "target ort-cpu, from synthetic:nano?seed=3 (synthetic weights)" in told
    assert "\nprojector  fp32  " in told
    assert "  parity against fp32 torch: relative error " in told
    assert "projector      ok" in wsi_rt("verify", root).out


def test_a_bundle_can_be_moved(root, tmp_path, hashed):
    moved = root.rename(tmp_path / "elsewhere")
    with Bundle.open(moved, threads=1).engine("projector") as engine:
        engine.run({"tokens": np.zeros((1, 1024), np.float32)})
    assert hashed == []


def test_threads_are_checked(root):
    assert Bundle.open(root, threads=2).threads == 2
    with pytest.raises(InputError, match="--threads is 0, expected 1"):
        Bundle.open(root, threads=0)


def test_manifest_json_round_trip(root):
    manifest = load_manifest(root)
    assert json.loads(json.dumps(manifest.to_json())) == json.loads((root / "manifest.json").read_text())
