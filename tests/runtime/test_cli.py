"""The command: every refusal is one line and an exit code and leaves nothing behind; every result is as documented."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import pickle
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest

from wsi_rt.runtime.bundle import Bundle
from wsi_rt.runtime.features import write_slide_tokens
from wsi_rt.runtime.manifest import load_manifest
from wsi_rt.runtime.types import Provenance, SlideTokens

Run = Callable[..., Any]
COMMAND = (sys.executable, "-m", "wsi_rt.runtime.cli")
QUESTION = "Is there necrosis?"
SHORT = ("--max-new-tokens", "12")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test works in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below `folder`, hidden ones too, with size and time."""
    return {
        str(p.relative_to(folder)): (p.lstat().st_size, p.lstat().st_mtime_ns) if p.is_file() else (0, 0)
        for p in folder.rglob("*")
    }


@pytest.fixture
def refused(wsi_rt: Run, here: Path) -> Run:
    """refused(code, words, *arguments): the command ends with `code` and one line holding `words`; nothing changes."""

    def check(code: int, words: str, *arguments: object) -> str:
        before = listing(here)
        result = wsi_rt(*arguments)
        assert (result.code, result.out) == (code, ""), result
        lines = result.err.splitlines()
        assert len(lines) == 1, result.err
        assert lines[0].startswith("wsi-rt: ")
        assert words in lines[0], lines[0]
        assert "Traceback" not in result.err
        assert listing(here) == before
        return lines[0]

    return check


@pytest.fixture(scope="session")
def tokens_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slide tokens without a slide."""
    tokens = np.zeros((576, 1024), np.float32)
    tokens[:, :768] = np.random.default_rng(0).standard_normal((576, 768))
    path = tmp_path_factory.mktemp("tokens") / "slide.pt"
    write_slide_tokens(path, SlideTokens(tokens, Provenance("test"), 576))
    return path


def write_tiff(path: Path, value: int, **options: Any) -> Path:
    """A tiled TIFF of 1,024 x 1,024 px in one grey."""
    import tifffile

    pixels = np.full((1024, 1024, 3), value, np.uint8)
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", compression="deflate", **options)
    return path


# --- inputs that are no usable slide
@pytest.mark.parametrize("command", ["ask", "encode"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("histolab_broken.svs", "not a slide"),
        ("ospy_unopenable.tiff", "cannot be opened (Unsupported TIFF compression"),
        ("ospy_boxes.tiff", "352.8 um/px"),
        ("ezwsi_multiframe_camelyon.dcm", "--target-mpp 28.97, or enlarge it with --allow-upsample"),
        ("ospy_small.svs", "no tissue"),
        ("slideio_test3-DAPI-2-387.ndpi", "background is dark"),
        ("", "holds 2 slides (DICOM series), expected one"),
        ("missing.svs", "no such file"),
    ],
)
def test_slides_that_cannot_be_used(
    refused: Run, shared_slides: Path, nano_bundle: Path, command: str, name: str, words: str
) -> None:
    arguments = [QUESTION] if command == "ask" else ["--out", "x.h5", "--out", "x.pt"]
    assert name in refused(2, words, command, shared_slides / name, *arguments, "--engines", nano_bundle)


def test_the_ways_out_for_a_dark_slide(wsi_rt: Run, refused: Run, shared_slides: Path, nano_bundle: Path) -> None:
    arguments = ("ask", shared_slides / "slideio_test3-DAPI-2-387.ndpi", QUESTION, "--engines", nano_bundle)
    refused(2, "give --allow-dark", *arguments)
    answer = json.loads(wsi_rt(*arguments, "--allow-dark", "--json", *SHORT).out)
    assert answer["tiles"]["kept"] == 42
    assert answer["settings"]["slide"]["allow_dark"] is True
    assert "the background is dark: the bright side was taken as tissue (--allow-dark)" in answer["notes"]


def test_a_text_file_is_no_slide(refused: Run, here: Path, nano_bundle: Path) -> None:
    (here / "notes.txt").write_text("no slide\n" * 100)
    refused(2, "not a slide", "ask", "notes.txt", QUESTION, "--engines", nano_bundle)


def test_a_slide_without_resolution_asks_for_it(refused: Run, wsi_rt: Run, here: Path, nano_bundle: Path) -> None:
    path = write_tiff(here / "plain.tiff", 255)
    refused(2, "states no resolution", "ask", path, QUESTION, "--engines", nano_bundle)
    assert "give the level-0 um/px with --mpp" in wsi_rt("ask", path, QUESTION, "--engines", nano_bundle).err
    refused(2, "no tissue", "ask", path, QUESTION, "--engines", nano_bundle, "--mpp", "0.5")


def test_all_background_is_no_tissue(refused: Run, wsi_rt: Run, here: Path, nano_bundle: Path) -> None:
    assert wsi_rt("synth-slide", "--out", "blank.svs", "--width", 900, "--height", 700, "--tissue", 0).code == 0
    refused(2, "no tissue", "ask", "blank.svs", QUESTION, "--engines", nano_bundle)


def test_a_coarse_slide_is_readable_at_its_own_resolution(wsi_rt: Run, shared_slides: Path, nano_bundle: Path) -> None:
    slide = shared_slides / "ezwsi_multiframe_camelyon.dcm"
    arguments = ("ask", slide, QUESTION, "--engines", nano_bundle, "--target-mpp", "28.97", "--json", *SHORT)
    result = wsi_rt(*arguments)
    assert result.code == 0, result.err
    assert json.loads(result.out)["tiles"] == {"grid": 15, "kept": 7, "failed": 0, "distinct_tokens": 7}


# --- files of features and tokens
@pytest.mark.parametrize("shape", [(575, 1024), (576, 512), (2, 576, 1024), (576,)], ids=str)
def test_token_files_of_another_shape(
    refused: Run, here: Path, nano_bundle: Path, export_extra: None, shape: tuple[int, ...]
) -> None:
    import torch

    torch.save(torch.zeros(shape), here / "wrong.pt")
    line = refused(2, str(list(shape)), "ask", "wrong.pt", QUESTION, "--engines", nano_bundle)
    assert "[576, 768] or [576, 1024]" in line


class Payload:
    """Writes a canary file when unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "zip"])
def test_a_pickle_with_code_runs_nothing(
    refused: Run, here: Path, nano_bundle: Path, wrapped: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    canary = tmp_path_factory.mktemp("canary") / "it_ran"
    data = pickle.dumps(Payload(canary), protocol=2)
    pickle.loads(data)
    assert canary.exists()  # the payload works
    canary.unlink()
    if wrapped:
        with zipfile.ZipFile(here / "evil.pt", "w") as archive:
            archive.writestr("evil/data.pkl", data)
            archive.writestr("evil/version", "3\n")
    else:
        (here / "evil.pt").write_bytes(data)
    refused(2, "evil.pt", "ask", "evil.pt", QUESTION, "--engines", nano_bundle)
    assert not canary.exists()


@pytest.mark.parametrize("name", ["missing.h5", "missing.pt", "folder.h5", "folder.pt", "text.h5", "text.pt"])
def test_feature_files_that_are_none(refused: Run, here: Path, nano_bundle: Path, name: str) -> None:
    if name.startswith("folder"):
        (here / name).mkdir()
    if name.startswith("text"):
        (here / name).write_text("text")
    line = refused(2, name, "ask", name, QUESTION, "--engines", nano_bundle)
    assert ("no such file" in line) == name.startswith("missing")


# --- flags and questions
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bogus"], "No such option '--bogus'; see"),
        (["--template", "x"], "--template is 'x', expected vicuna_v1 or llava_v1"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "warm"], "'--temperature': 'warm' is not a valid float"),
        (["--top-p", "2"], "--top-p is 2.0"),
        (["--top-k", "-1"], "--top-k is -1"),
        (["--repetition-penalty", "0"], "--repetition-penalty is 0.0"),
        (["--no-repeat-ngram-size", "-1"], "--no-repeat-ngram-size is -1"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--stop", ""], "--stop"),
        (["--threads", "0"], "--threads is 0, expected 1 to"),
        (["--threads", "100000"], "--threads is 100000, expected 1 to"),
        (["--mpp", "0"], "--mpp is 0.0"),
        (["--target-mpp", "200"], "--target-mpp is 200.0"),
        (["--position-tile", "0"], "--position-tile is 0"),
        (["--engines"], "Option '--engines' requires an argument"),
    ],
    ids=lambda v: "_".join(v) if isinstance(v, list) else "",
)
def test_flags_out_of_range(refused: Run, nano_bundle: Path, tokens_file: Path, flags: list[str], words: str) -> None:
    refused(2, words, "ask", tokens_file, QUESTION, "--engines", nano_bundle, *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--target", "x"], "'x', expected one of: ort-cpu"),
        (["--sm", "80"], "--sm is given, but ort-cpu engines are for no one architecture"),
        (["--sm", "ada"], "'ada' is no list of architectures such as 80,90"),
        (["--target", "tensorrt-rtx", "--sm", "70"], "--sm has 70, tensorrt-rtx builds for: 75, 80"),
        (["--target", "torch", "--fast"], "--fast is for the target ort-cpu"),
        (["--precision", "int3"], "--precision is 'int3'"),
        (["--precision", "llm=int3"], "--precision has 'llm=int3'"),
        (["--precision", "lm=fp32"], "--precision has 'lm=fp32'"),
        (["--components", "llm,lm"], "--components has 'lm'"),
        (["--components", ""], "--components is ''"),
        (["--threads", "0"], "--threads is 0"),
        (["--checkpoint", "synthetic:pico"], "'synthetic:pico'"),
        (["--checkpoint", "synthetic:nano?seed=x"], "'synthetic:nano?seed=x'"),
        (["--checkpoint", "synthetic:nano?sed=1"], "'synthetic:nano?sed=1'"),
        (["--checkpoint", "nowhere"], "nowhere: expected synthetic:<preset>?seed=N, or a folder"),
        (["--slide-encoder", "nowhere"], "nowhere: no such file or folder"),
    ],
    ids=lambda v: "_".join(v) if isinstance(v, list) else "",
)
@pytest.mark.parametrize("dry", [True, False], ids=["dry", "real"])
def test_build_flags_out_of_range(refused: Run, export_extra: None, flags: list[str], words: str, dry: bool) -> None:
    source = [] if "--checkpoint" in flags else ["--checkpoint", "synthetic:nano"]
    refused(2, words, "build-engines", *source, "--out", "bundle", *flags, *(["--dry-run"] if dry else []))


def test_usage(refused: Run, export_extra: None, here: Path, nano_bundle: Path, tokens_file: Path) -> None:
    refused(2, "no checkpoint given", "build-engines", "--out", "bundle")
    refused(2, "Missing option '--out'", "build-engines", "--checkpoint", "synthetic:nano")
    refused(2, "No such command 'aks'", "aks")
    refused(2, "Missing argument 'QUESTION'", "ask", tokens_file, "--engines", nano_bundle)
    refused(2, "unexpected extra argument", "ask", tokens_file, "Is", "it?", "--engines", nano_bundle)
    refused(2, "no engine bundle there; build one", "ask", tokens_file, QUESTION, "--engines", "nowhere")
    refused(2, "a folder without manifest.json", "inspect", here)


@pytest.mark.skipif(not hasattr(click, "NoSuchCommand"), reason="this click proposes no commands")
def test_a_misspelt_command_is_told_the_nearest(refused: Run) -> None:
    refused(2, "No such command 'build-engine'. Did you mean 'build-engines'?; see wsi-rt --help", "build-engine")


def test_synth_slide_flags(refused: Run, here: Path) -> None:
    refused(2, "there is no folder nowhere", "synth-slide", "--out", "nowhere/x.svs")
    refused(2, "no regular file", "synth-slide", "--out", here)
    refused(2, "'--seed': -1", "synth-slide", "--out", "x.svs", "--seed", "-1")
    refused(2, "codec is 'webp'", "synth-slide", "--out", "x.svs", "--codec", "webp")
    refused(2, "'1,x' is no list of downsamples", "synth-slide", "--out", "x.svs", "--levels", "1,x")
    refused(2, "tissue is 2.0", "synth-slide", "--out", "x.svs", "--tissue", "2")


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("", "the question is ''"),
        (" \n", "expected some text"),
        ("<image>\nWhat?", "the question contains <image>"),
        ("word " * 10_000, "expected fewer than the context of 4096; shorten the question"),
        ("\udcff", "undecodable character"),
    ],
    ids=["empty", "blank", "image", "10000-words", "not-utf8"],
)
def test_questions_that_cannot_be_asked(
    refused: Run, nano_bundle: Path, tokens_file: Path, question: str, words: str
) -> None:
    line = refused(2, words, "ask", tokens_file, question, "--engines", nano_bundle)
    assert len(line) < 300


# --- where results go
@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("x.txt", "expected a name ending in .h5 (tile features) or .pt (slide tokens)"),
        ("x", "expected a name ending in .h5"),
        ("nowhere/x.pt", "there is no folder nowhere; make it first: mkdir -p nowhere"),
        ("no where/x.pt", "make it first: mkdir -p 'no where'"),
        ("folder.pt", "no regular file"),
        ("device.pt", "no regular file"),
        ("x.h5", "holds slide tokens: no tile features can be made from it"),
    ],
)
def test_encode_refuses_the_place_before_the_work(
    refused: Run, here: Path, nano_bundle: Path, tokens_file: Path, out: str, words: str
) -> None:
    """A device too: the final rename would replace it, for everyone, when root runs the command."""
    (here / "folder.pt").mkdir()
    (here / "device.pt").symlink_to("/dev/null")
    refused(2, words, "encode", tokens_file, "--engines", nano_bundle, "--out", "good.pt", "--out", out)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(refused: Run, here: Path, nano_bundle: Path, tokens_file: Path) -> None:
    (here / "closed").mkdir(mode=0o555)
    refused(3, "not writable", "encode", tokens_file, "--engines", nano_bundle, "--out", "closed/x.pt")
    refused(3, "cannot write", "build-engines", "--checkpoint", "synthetic:nano", "--out", "closed/bundle")


def test_a_bundle_cannot_go_where_something_else_is(refused: Run, here: Path, export_extra: None) -> None:
    (here / "file").write_text("mine")
    (here / "folder").mkdir()
    (here / "folder" / "mine").write_text("mine")
    build = ("build-engines", "--checkpoint", "synthetic:nano", "--components", "projector", "--out")
    refused(2, "no engine bundle; choose another --out", *build, "file")
    refused(2, "something stands in the way", *build, "file/bundle")
    refused(2, "no engine bundle; choose another --out", *build, "folder")
    refused(2, "no engine bundle; choose another --out", *build, "folder", "--force")
    refused(3, "/proc", *build, "/proc/bundle")


def limit_file_size() -> None:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


@pytest.mark.parametrize("command", ["build-engines", "encode", "synth-slide"])
def test_a_full_disk(wsi_rt_process: Run, here: Path, nano_bundle: Path, tokens_file: Path, command: str) -> None:
    """A file may grow to 1 MiB only, which fails a write as a full disk does."""
    arguments = {
        "build-engines": ("--checkpoint", "synthetic:nano", "--components", "slide_encoder", "--out", "bundle"),
        "encode": (tokens_file, "--engines", nano_bundle, "--out", "x.pt"),
        "synth-slide": ("--out", "x.svs", "--codec", "raw"),
    }[command]
    result = wsi_rt_process(command, *arguments, preexec_fn=limit_file_size)
    assert (result.code, result.out) == (3, "")
    assert result.err.startswith("wsi-rt: ")
    assert len(result.err.splitlines()) == 1
    assert not list(here.iterdir())


# --- checkpoints
@pytest.mark.parametrize("flaw", ["missing", "unexpected", "misshapen"])
def test_a_checkpoint_with_wrong_tensors(refused: Run, here: Path, export_extra: None, flaw: str) -> None:
    from safetensors.numpy import save_file

    from wsi_rt.export.arch import LongNetConfig

    config = LongNetConfig(in_width=32, width=64, depth=2, heads=16, ffn=128, norm_width=64)
    tensors = {name: np.zeros(shape, np.float32) for name, shape in config.tensors().items()}
    name = "encoder.layers.1.ffn.fc2.bias"
    if flaw == "missing":
        del tensors[name]
    elif flaw == "unexpected":
        name = "encoder.layers.1.ffn.gate.bias"
        tensors[name] = np.zeros(64, np.float32)
    else:
        tensors[name] = np.zeros(65, np.float32)
    save_file(tensors, here / "slide_encoder.safetensors")
    refused(2, name, "build-engines", "--slide-encoder", "slide_encoder.safetensors", "--out", "bundle")


def test_a_timm_folder_with_a_missing_tensor(refused: Run, here: Path, export_extra: None) -> None:
    from safetensors.numpy import save_file

    folder = here / "tile_encoder"
    folder.mkdir()
    arguments = {"patch_size": 16, "embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 224}
    (folder / "config.json").write_text(
        json.dumps({"architecture": "vit_giant_patch14_dinov2", "model_args": arguments, "num_features": 48})
    )
    save_file({"cls_token": np.zeros((1, 1, 48), np.float32)}, folder / "model.safetensors")
    refused(2, "pos_embed", "build-engines", "--tile-encoder", "tile_encoder", "--out", "bundle")


# --- bundles that changed
def replace_file(path: Path, data: bytes) -> None:
    """Not in place: the bundle's other files are hard links of the shared one."""
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize("command", ["ask", "verify"])
def test_an_edited_bundle_is_refused(refused: Run, own_bundle: Path, tokens_file: Path, command: str) -> None:
    arguments = (tokens_file, QUESTION, "--engines", own_bundle) if command == "ask" else (own_bundle,)
    weights = next(p for p in (own_bundle / "llm").rglob("*") if p.is_file() and p.stat().st_size > 1 << 20)
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    replace_file(weights, bytes(data))
    line = refused(4, "edited after the build", command, *arguments)
    assert "rebuild: wsi-rt build-engines --checkpoint" in line
    replace_file(weights, bytes(data[:-1]))
    refused(4, "the manifest says", command, *arguments)
    weights.unlink()
    refused(4, "missing from the bundle", command, *arguments)


def test_an_edit_that_keeps_size_and_time_is_found_by_verify(refused: Run, own_bundle: Path) -> None:
    path = own_bundle / "tokenizer" / "tokenizer.json"
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[-2] ^= 1
    replace_file(path, bytes(data))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    refused(4, "tokenizer.json: edited", "verify", own_bundle)


def test_an_edited_manifest_is_refused(refused: Run, own_bundle: Path) -> None:
    path = own_bundle / "manifest.json"
    text = path.read_text()
    replace_file(path, text.replace('"temperature": 0.0', '"temperature": 0.5').encode())
    refused(4, "edited after the build", "inspect", own_bundle)
    replace_file(path, text[: len(text) // 2].encode())
    refused(4, "damaged", "inspect", own_bundle)


def test_numbers_that_differ_fail_verify(wsi_rt: Run, own_bundle: Path) -> None:
    """A bundle whose digests are right and whose projector computes something else: exit code 5."""
    from wsi_rt.runtime.hashing import sha256_json

    check = own_bundle / "projector" / "check.npz"
    if not check.is_file():
        check = own_bundle / load_manifest(own_bundle).components["projector"].check
    with np.load(check) as stored:
        arrays = {name: stored[name] * (1.01 if name.startswith("output.") else 1) for name in stored.files}
    check.unlink()
    np.savez(check, **arrays)
    data = json.loads((own_bundle / "manifest.json").read_text())
    entry = data["files"][str(check.relative_to(own_bundle))]
    entry |= {"size": check.stat().st_size, "sha256": hashlib.sha256(check.read_bytes()).hexdigest()}
    del data["digest"]
    replace_file(own_bundle / "manifest.json", json.dumps({**data, "digest": sha256_json(data)}).encode())
    result = wsi_rt("verify", own_bundle)
    assert result.code == 5
    assert "projector differ from the fp32 reference" in result.err
    assert "projector      FAILED" in result.out
    assert "llm            ok" in result.out


# --- signals
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_while_building_leaves_what_was_there(
    wsi_rt_process: Run, here: Path, own_bundle: Path, name: str
) -> None:
    """Over an existing bundle with --force, and to a new place; a second Ctrl-C must not stop the clean-up."""
    before = listing(here)
    for out in (own_bundle, here / "new"):
        workplace = out.parent / f".{out.name}.building"
        process = subprocess.Popen(
            [*COMMAND, "build-engines", "--checkpoint", "synthetic:nano?seed=1", "--out", out, "--force"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 60
        while not (workplace.is_dir() and any(workplace.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(getattr(signal, name))
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out_text, err = process.communicate(timeout=60)
        assert (process.returncode, out_text) == (130, "")
        assert err.splitlines() == ["wsi-rt: interrupted; nothing half-written is left behind"]
        assert listing(here) == before
    Bundle.open(own_bundle).verify_files()


def test_ctrl_c_while_answering(nano_bundle: Path, tokens_file: Path, here: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "ask", tokens_file, QUESTION, "--engines", nano_bundle, "--max-new-tokens", "3000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.decode().splitlines() == ["wsi-rt: interrupted; nothing half-written is left behind"]
    assert not list(here.iterdir())


# --- output that cannot be written
def test_a_closed_pipe_is_quiet(nano_bundle: Path, tokens_file: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "ask", tokens_file, QUESTION, "--engines", nano_bundle, "--max-new-tokens", "300"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    err = process.stderr.read().decode()
    assert process.wait(timeout=60) == 1
    assert err == ""


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
@pytest.mark.parametrize("json_flag", [(), ("--json",)], ids=["text", "json"])
def test_output_on_a_full_disk(
    wsi_rt_process: Run, nano_bundle: Path, tokens_file: Path, json_flag: tuple[str, ...]
) -> None:
    arguments = ("ask", tokens_file, QUESTION, "--engines", nano_bundle, *SHORT, *json_flag)
    with open("/dev/full", "w") as full:
        result = wsi_rt_process(*arguments, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert result.code == 3
    assert result.err.splitlines()[-1] == "wsi-rt: the output: No space left on device"
    assert "Traceback" not in result.err


def test_without_stdout(wsi_rt_process: Run, nano_bundle: Path, tokens_file: Path) -> None:
    def close() -> None:
        os.close(1)

    arguments = ("ask", tokens_file, QUESTION, "--engines", nano_bundle, *SHORT)
    result = wsi_rt_process(*arguments, capture_output=False, stderr=subprocess.PIPE, preexec_fn=close)
    assert result.code == 0
    assert "Traceback" not in result.err


# --- the good paths
def test_help_and_version(wsi_rt: Run) -> None:
    bare = wsi_rt()
    assert (bare.code, bare.out) == (2, "")
    assert bare.err.startswith("Usage: wsi-rt ")
    for flags in (["--help"], ["-h"], ["ask", "-h"]):
        result = wsi_rt(*flags)
        assert (result.code, result.err) == (0, "")
        assert result.out.startswith("Usage: wsi-rt ")
    assert wsi_rt("--version").out.startswith("wsi-rt, version ")


def test_dry_run_writes_nothing(wsi_rt: Run, here: Path, export_extra: None) -> None:
    result = wsi_rt("build-engines", "--checkpoint", "synthetic:nano", "--out", "bundle", "--dry-run")
    assert result.code == 0
    assert [line.split()[0] for line in result.out.splitlines()[1:5]] == [
        *("tile_encoder", "slide_encoder", "projector", "llm"),
    ]
    assert "nothing was written" in result.out
    assert not list(here.iterdir())


def test_build_reports_and_rebuilds_only_when_asked(wsi_rt: Run, here: Path, export_extra: None) -> None:
    def build(source: str, *flags: str) -> Any:
        names = ("--components", "projector", "--precision", "projector=fp32")
        return wsi_rt("build-engines", "--checkpoint", source, "--out", "bundle", *names, *flags)

    assert build("synthetic:nano").err.startswith("bundle: projector for ort-cpu")
    assert {p.name for p in here.iterdir()} == {"bundle"}
    before = listing(here)
    assert build("synthetic:nano?seed=0").err == "bundle: up to date\n"
    other = build("synthetic:nano?seed=1")
    assert other.code == 2
    assert "holds another build (of synthetic:nano?seed=0); replace it with --force" in other.err
    assert listing(here) == before
    assert build("synthetic:nano?seed=1", "--force").code == 0
    assert {p.name for p in here.iterdir()} == {"bundle"}
    assert load_manifest(here / "bundle").source["label"] == "synthetic:nano?seed=1"
    missing = wsi_rt("ask", "x.pt", QUESTION, "--engines", "bundle")
    assert missing.code == 2
    assert "no llm in this bundle (it has projector)" in missing.err


def test_inspect(wsi_rt: Run, nano_bundle: Path) -> None:
    result = wsi_rt("inspect", nano_bundle)
    assert (result.code, result.err) == (0, "")
    assert "synthetic:nano?seed=0 (synthetic weights)" in result.out
    assert "tiles uint8 [batch, 256, 256, 3]" in result.out
    data = json.loads(wsi_rt("inspect", nano_bundle, "--json").out)
    assert list(data["components"]) == ["tile_encoder", "slide_encoder", "projector", "llm"]
    assert data == json.loads((nano_bundle / "manifest.json").read_text())


def test_verify(wsi_rt: Run, nano_bundle: Path) -> None:
    result = wsi_rt("verify", nano_bundle)
    assert result.code == 0
    assert result.out.count(" ok ") == 4
    report = json.loads(wsi_rt("verify", nano_bundle, "--json").out)
    assert report["files"] == len(load_manifest(nano_bundle).files)
    assert all(c["ok"] for c in report["components"].values())


def test_doctor(wsi_rt: Run) -> None:
    result = wsi_rt("doctor")
    assert (result.code, result.err) == (0, "")
    assert result.out.endswith("ok: engines can run here\n")
    report = json.loads(wsi_rt("doctor", "--json").out)
    assert report["ok"]
    assert report["problems"] == []
    assert report["base"]["onnxruntime"]
    assert 1 <= report["machine"]["usable_cpus"] <= report["machine"]["cpus"]


def test_doctor_names_a_problem_and_fails(wsi_rt: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openslide", None)
    result = wsi_rt("doctor")
    assert result.code == 3
    assert "PROBLEM OpenSlide does not load" in result.out
    assert not json.loads(wsi_rt("doctor", "--json").out)["ok"]


def test_ask_json_is_the_contract(wsi_rt_process: Run, nano_bundle: Path, slide: Path, here: Path) -> None:
    flags = ("--temperature", "0.7", "--top-k", 5, "--top-p", 0.9, "--repetition-penalty", 1.1, "--seed", 7)
    flags += ("--no-repeat-ngram-size", 3, "--template", "llava_v1", "--stop", "###", "--threads", 2, *SHORT)
    result = wsi_rt_process("ask", slide, QUESTION, "--engines", nano_bundle, "--json", *flags)
    assert (result.code, result.err) == (0, "")
    answer = json.loads(result.out)
    assert set(answer) == {
        *("text", "token_ids", "stop_reason", "timings_ms", "tiles", "engines", "settings", "notes"),
    }
    assert isinstance(answer["text"], str)
    assert all(isinstance(t, int) for t in answer["token_ids"])
    assert 1 <= len(answer["token_ids"]) <= 12
    assert answer["stop_reason"] in {"eos", "length", "stop_string", "cancelled"}
    assert list(answer["timings_ms"]) == [
        *("open", "tissue", "tiles", "tile_encoder", "slide_encoder", "projector", "prefill", "decode"),
    ]
    assert all(isinstance(ms, float) and ms > 0 for ms in answer["timings_ms"].values())
    assert set(answer["tiles"]) == {"grid", "kept", "failed", "distinct_tokens"}
    assert 0 < answer["tiles"]["kept"] <= answer["tiles"]["grid"]
    assert answer["engines"] == {n: c.digest for n, c in load_manifest(nano_bundle).components.items()}
    chosen = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3}
    chosen |= {"seed": 7, "template": "llava_v1", "stop": ["###"], "threads": 2, "max_new_tokens": 12}
    assert {k: answer["settings"][k] for k in chosen} == chosen
    assert set(answer["settings"]["precision"].values()) == {"fp32"}
    assert QUESTION not in result.out  # nothing that could tell what was asked
    assert not list(here.iterdir())


def test_the_real_slide_has_its_tiles(wsi_rt: Run, nano_bundle: Path, shared_slides: Path) -> None:
    slide = shared_slides / "CMU-1-Small-Region.svs"
    answer = json.loads(wsi_rt("ask", slide, QUESTION, "--engines", nano_bundle, "--json", *SHORT).out)
    assert answer["tiles"] == {"grid": 108, "kept": 54, "failed": 0, "distinct_tokens": 54}
    assert answer["settings"]["slide"]["mpp0"] == 0.499


def test_ask_as_text(wsi_rt_process: Run, nano_bundle: Path, slide: Path) -> None:
    arguments = ("ask", slide, QUESTION, "--engines", nano_bundle, *SHORT)
    text, answer = wsi_rt_process(*arguments), json.loads(wsi_rt_process(*arguments, "--json").out)
    assert text.code == 0
    assert text.out == answer["text"] + "\n"
    tiles, ms, *notes = text.err.splitlines()
    assert tiles == "tiles: {kept} kept of {grid}, {distinct_tokens} distinct slide tokens".format(**answer["tiles"])
    assert ms.startswith("ms: open ")
    assert any(n.startswith("answer: 12 tokens") for n in notes)
    assert "note: these engines hold synthetic weights; the answer has no meaning" in notes


def test_encode_then_ask(wsi_rt: Run, nano_bundle: Path, slide: Path, here: Path) -> None:
    result = wsi_rt("encode", slide, "--engines", nano_bundle, "--out", "a.h5", "--out", here / "a.pt")
    assert (result.code, result.out) == (0, f"a.h5\n{here / 'a.pt'}\n")
    assert {p.name for p in here.iterdir()} == {"a.h5", "a.pt"}
    again = wsi_rt("encode", "a.h5", "--engines", nano_bundle, "--out", "b.PT", "--json")
    assert (again.code, again.err) == (0, "")
    report = json.loads(again.out)
    assert set(report) == {"out", "tiles", "failed_tiles", "timings_ms", "notes"}
    assert report["out"] == ["b.PT"]
    answers = [
        json.loads(wsi_rt("ask", source, QUESTION, "--engines", nano_bundle, "--json", *SHORT).out)["token_ids"]
        for source in (slide, "a.h5", "a.pt", "b.PT")
    ]
    assert answers == [answers[0]] * 4
    assert len(answers[0]) == 12


def test_features_and_tokens_of_another_checkpoint_are_refused(
    wsi_rt: Run, refused: Run, nano_bundle: Path, slide: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("seed1")
    parts = ("--checkpoint", "synthetic:nano?seed=1", "--components", "tile_encoder,slide_encoder")
    assert wsi_rt("build-engines", *parts, "--out", folder / "engines").code == 0
    outs = ("--out", folder / "a.h5", "--out", folder / "a.pt")
    assert wsi_rt("encode", slide, "--engines", folder / "engines", *outs).code == 0
    for name, maker in (("a.h5", "tile_encoder"), ("a.pt", "slide_encoder")):
        words = f"another {maker} (weights {load_manifest(folder / 'engines').components[maker].weights[:12]})"
        refused(2, words, "ask", folder / name, QUESTION, "--engines", nano_bundle)
    words = "another tile_encoder"
    refused(2, words, "encode", folder / "a.h5", "--engines", nano_bundle, "--out", "b.pt")


def test_encode_carries_what_a_file_says_of_its_slide(wsi_rt: Run, nano_bundle: Path, here: Path) -> None:
    import h5py

    said = {"name": "TCGA-1", "patch_size": 512, "overlap": 0, "target_magnification": 40, "patch_size_level0": 512}
    with h5py.File(here / "ext.h5", "w") as root:
        root["features"] = np.random.default_rng(0).standard_normal((2, 96)).astype(np.float32)
        root["coords"] = np.array([[0, 0], [512, 0]])
        root["coords"].attrs.update(said)
    assert wsi_rt("encode", "ext.h5", "--engines", nano_bundle, "--out", "copy.h5").code == 0
    with h5py.File(here / "copy.h5") as root:
        assert dict(root["coords"].attrs) == said


def test_paths_and_questions_in_any_script(
    wsi_rt: Run, wsi_rt_process: Run, here: Path, synth_slide: Path, nano_bundle: Path
) -> None:
    folder = here / "Gewebe ü 组织"
    folder.mkdir()
    slide = folder / "Schnitt 1 ü.svs"
    slide.symlink_to(synth_slide)
    (folder / "engines ü").symlink_to(nano_bundle)
    assert wsi_rt("encode", slide, "--engines", folder / "engines ü", "--out", folder / "ü.pt").code == 0
    plain = {**os.environ, "LC_ALL": "C"}
    arguments = ("ask", folder / "ü.pt", "这是什么组织？", "--engines", nano_bundle, *SHORT, "--json")
    for environment in (dict(os.environ), plain):
        result = wsi_rt_process(*arguments, env=environment)
        assert result.code == 0, result.err
        assert len(json.loads(result.out)["token_ids"]) == 12


def test_synth_slide_is_reproducible(wsi_rt: Run, here: Path) -> None:
    for name in ("a.svs", "b.svs"):
        result = wsi_rt("synth-slide", "--out", name, "--width", 700, "--height", 500)
        assert (result.code, result.out) == (0, f"{name}\n")
    assert (here / "a.svs").read_bytes() == (here / "b.svs").read_bytes()


def on_a_terminal(*arguments: object) -> str:
    """What 24 x 100 characters of a terminal receive; the command succeeds."""
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stdin=side, stdout=side, stderr=side)
    os.close(side)
    received = bytearray()
    while True:
        try:
            data = os.read(main, 65536)
        except OSError:  # EIO: the last user of the terminal left
            break
        if not data:
            break
        received += data
    os.close(main)
    assert process.wait(timeout=60) == 0
    return received.decode().replace("\r\n", "\n")


def test_progress_bars_do_not_mix_with_the_answer(wsi_rt: Run, nano_bundle: Path, slide: Path) -> None:
    arguments = ("ask", slide, QUESTION, "--engines", nano_bundle, *SHORT)
    received = on_a_terminal(*arguments)
    assert "tile encoder" in received
    text = json.loads(wsi_rt(*arguments, "--json").out)["text"]
    shown = "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
    bars, _, after = received.rpartition("\r")  # a bar's last act is to blank its line
    assert after.startswith(shown + "\ntiles: ")
    assert "tokens/s" not in bars


def test_a_build_shows_its_steps_on_a_terminal(export_extra: None, here: Path) -> None:
    received = on_a_terminal(
        *("build-engines", "--checkpoint", "synthetic:nano", "--components", "projector", "--out", "bundle")
    )
    assert "build: projector: export" in received
    assert received.rpartition("\r")[2] == "bundle: projector for ort-cpu, 3 MB\n"
