"""The feature store: what is found, what is kept, what is dropped, and who has to wait."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from wsi_rt.runtime.errors import InputError, MachineError
from wsi_rt.runtime.features.store import FeatureStore, TilesKey, TokensKey, grid_digest
from wsi_rt.runtime.features.store_entries import ABANDONED_S, FORGOTTEN_S, entry_path, listed, prune
from wsi_rt.runtime.features.store_place import bound_from_environment, default_root, parse_bytes
from wsi_rt.runtime.types import Provenance, SlideTokens, TileFeatures, TileGrid

GRID = TileGrid(np.array([(x * 256, y * 256) for y in range(4) for x in range(5)], np.int64), 256, cells=30)
KEY = TilesKey("5a" * 32, "openslide 4.0.1", grid_digest(GRID, {"level": 0}), "ab" * 32, "fp32")
TOKENS_KEY = TokensKey(KEY, 256, "cd" * 32, "fp32")


def features(seed: int = 0, width: int = 16) -> TileFeatures:
    x = np.random.default_rng(seed).standard_normal((len(GRID), width)).astype(np.float32)
    return TileFeatures(x, GRID, Provenance("tile_encoder", "ab" * 32, {"slide": "f1", "precision": "fp32"}))


def tokens() -> SlideTokens:
    x = np.random.default_rng(1).standard_normal((576, 1024)).astype(np.float32)
    made_by = Provenance("slide_encoder", "cd" * 32, {"position_tile": 256, "order": "row-major"})
    return SlideTokens(x, made_by, 20, ("20 tiles fill 576 slide tokens",))


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    return FeatureStore(tmp_path / "cache")


def files(store: FeatureStore) -> list[Path]:
    return sorted(p for p in (store.root / "entries").rglob("*") if p.is_file())


# --- what goes in comes out
def test_features_and_tokens_come_back_as_they_were(store: FeatureStore):
    assert store.get_tiles(KEY, GRID) is None
    assert store.get_tokens(TOKENS_KEY) is None
    store.put_tiles(KEY, features())
    store.put_tokens(TOKENS_KEY, tokens(), len(GRID))
    found, found_tokens = store.get_tiles(KEY, GRID), store.get_tokens(TOKENS_KEY)
    assert found is not None
    assert found_tokens is not None
    np.testing.assert_array_equal(found.x, features().x)
    np.testing.assert_array_equal(found_tokens.tokens, tokens().tokens)
    assert found.grid is GRID
    assert found.provenance == features().provenance
    made = tokens()
    assert replace(found_tokens, tokens=None) == replace(made, tokens=None)
    assert store.take_notes() == ()


def test_entries_are_files_that_others_read(store: FeatureStore):
    torch = pytest.importorskip("torch", reason="the export extra is missing")
    store.put_tiles(KEY, features())
    store.put_tokens(TOKENS_KEY, tokens(), len(GRID))
    h5, pt = (next(p for p in files(store) if p.suffix == s) for s in (".h5", ".pt"))
    with h5py.File(h5) as root:
        assert root["features"].shape == (20, 16)
        assert root["coords"].attrs["patch_size_level0"] == 256
    assert torch.load(pt, weights_only=True).shape == (576, 1024)


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, slide="00" * 32),
        replace(KEY, reader="openslide 4.0.2"),
        replace(KEY, grid=grid_digest(GRID, {"level": 1})),
        replace(KEY, grid=grid_digest(replace(GRID, xy0=GRID.xy0 + 1), {"level": 0})),
        replace(KEY, grid=grid_digest(replace(GRID, xy0=GRID.xy0[::-1].copy()), {"level": 0})),
        replace(KEY, grid=grid_digest(replace(GRID, patch_size_level0=512), {"level": 0})),
        replace(KEY, grid=grid_digest(replace(GRID, order="file"), {"level": 0})),
        replace(KEY, encoder="00" * 32),
        replace(KEY, precision="int8"),
        replace(KEY, revision=KEY.revision + 1),
    ],
    ids=["slide", "reader", "level", "tiles", "order", "patch", "order-name", "encoder", "precision", "revision"],
)
def test_whatever_else_acts_finds_nothing(store: FeatureStore, other: TilesKey):
    store.put_tiles(KEY, features())
    store.put_tokens(TOKENS_KEY, tokens(), len(GRID))
    assert store.get_tiles(other, GRID) is None
    assert store.get_tokens(replace(TOKENS_KEY, tiles=other)) is None


@pytest.mark.parametrize("change", [{"position_tile": 512}, {"encoder": "00" * 32}, {"precision": "int8"}], ids=str)
def test_tokens_depend_on_the_slide_encoder_too(store: FeatureStore, change: dict[str, object]):
    store.put_tokens(TOKENS_KEY, tokens(), len(GRID))
    assert store.get_tokens(replace(TOKENS_KEY, **change)) is None


# --- damage
@pytest.mark.parametrize("where", ["first", "middle", "last"])
@pytest.mark.parametrize("suffix", [".h5", ".pt", ".json"])
def test_a_flipped_bit_drops_the_entry_with_a_note(store: FeatureStore, suffix: str, where: str):
    store.put_tiles(KEY, features())
    store.put_tokens(TOKENS_KEY, tokens(), len(GRID))
    for path in (p for p in files(store) if p.suffix == suffix):
        data = bytearray(path.read_bytes())
        data[{"first": 0, "middle": len(data) // 2, "last": len(data) - 1}[where]] ^= 4
        path.write_bytes(data)
    found = [store.get_tiles(KEY, GRID), store.get_tokens(TOKENS_KEY)]
    broken = [suffix in (".h5", ".json"), suffix in (".pt", ".json")]
    assert [f is None for f in found] == broken
    notes = store.take_notes()
    assert notes
    assert all("a damaged cache entry was dropped" in n for n in notes)
    assert len(files(store)) == 2 * broken.count(False)
    store.put_tiles(KEY, features())
    assert store.get_tiles(KEY, GRID) is not None


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99], ids=["empty", "ten-bytes", "half", "almost"])
def test_a_file_cut_short_is_dropped(store: FeatureStore, keep: float):
    store.put_tiles(KEY, features())
    path = next(p for p in files(store) if p.suffix == ".h5")
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    assert store.get_tiles(KEY, GRID) is None
    assert files(store) == []


def test_another_entry_in_its_place_is_not_taken(store: FeatureStore):
    """Whole and intact, but of another key: copied by hand, or an attack on a shared folder."""
    other = replace(KEY, slide="00" * 32)
    store.put_tiles(other, features(seed=7))
    for path in files(store):
        wrong = entry_path(store.root, _name(KEY)).with_suffix(path.suffix)
        wrong.parent.mkdir(parents=True, exist_ok=True)
        wrong.write_bytes(path.read_bytes())
    assert store.get_tiles(KEY, GRID) is None


def _name(key: TilesKey) -> str:
    from wsi_rt.runtime.hashing import sha256_json

    return sha256_json(key.to_json())


def test_numbers_without_their_entry_are_not_found(store: FeatureStore):
    """What a kill between the two writes leaves; it is rubbish a day later."""
    store.put_tiles(KEY, features())
    entry_path(store.root, _name(KEY)).unlink()
    assert store.get_tiles(KEY, GRID) is None
    assert prune(store.root).rubbish == 0
    _age(files(store)[0], ABANDONED_S + 1)
    assert prune(store.root).rubbish == 1
    assert files(store) == []


def test_a_temporary_file_of_a_killed_run_is_removed_a_day_later(store: FeatureStore):
    store.put_tiles(KEY, features())
    left = files(store)[0].parent / ".x.h5.123-abcd.tmp"
    left.write_bytes(b"half")
    assert prune(store.root).rubbish == 0
    _age(left, ABANDONED_S + 1)
    assert prune(store.root).rubbish == 1
    assert store.get_tiles(KEY, GRID) is not None


def _age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


# --- a place that cannot be used
def test_a_full_disk_keeps_nothing_half_written(tmp_path: Path):
    """A file may not grow beyond 100 kB here, as on a disk that is full: EFBIG instead of ENOSPC."""
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from test_store import *
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
store = FeatureStore(Path({str(tmp_path / "cache")!r}))
store.put_tiles(KEY, features())
store.put_tiles(replace(KEY, slide="00" * 32), features(width=4096))
store.put_tokens(TOKENS_KEY, tokens(), 20)
print(store.take_notes())
print(store.get_tiles(KEY, GRID) is not None, store.get_tokens(TOKENS_KEY), len(files(store)))
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    notes, found = done.stdout.splitlines()
    assert notes.count("not kept in the cache: no room to write") == 2
    assert found == "True None 2"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_told(tmp_path: Path):
    tmp_path.chmod(0o500)
    store = FeatureStore(tmp_path / "cache")
    store.put_tiles(KEY, features())
    assert "not kept in the cache" in store.take_notes()[0]


def test_a_file_in_the_way_is_told_and_never_fails_a_run(tmp_path: Path):
    (tmp_path / "cache").write_text("in the way")
    store = FeatureStore(tmp_path / "cache")
    assert store.get_tiles(KEY, GRID) is None
    with store.lock(KEY) as waited:
        store.put_tiles(KEY, features())
    assert not waited
    notes = store.take_notes()
    assert "cannot be locked" in notes[0]
    assert "not kept in the cache" in notes[1]
    with pytest.raises((InputError, MachineError), match=r"in the way|cannot write"):
        store.require_usable()


def test_the_folder_is_for_its_user_alone(store: FeatureStore):
    store.put_tiles(KEY, features())
    assert store.root.stat().st_mode & 0o777 == 0o700
    assert (store.root / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")


# --- size
def test_the_least_recently_used_go_first(store: FeatureStore):
    keys = [replace(KEY, slide=f"{i:02d}" * 32) for i in range(4)]
    for i, key in enumerate(keys[:3]):
        store.put_tiles(key, features(i))
        _age(entry_path(store.root, _name(key)), 3000 - 1000 * i)
    size = listed(store.root)[0].size_bytes
    assert store.get_tiles(keys[0], GRID) is not None  # used just now
    bounded = FeatureStore(store.root, max_bytes=int(3.5 * size))
    bounded.put_tiles(keys[3], features(3))
    assert [store.get_tiles(k, GRID) is not None for k in keys] == [True, False, True, True]
    assert len(files(store)) == 6


def test_prune_by_age_and_size(store: FeatureStore):
    for i in range(3):
        key = replace(KEY, slide=f"{i:02d}" * 32)
        store.put_tiles(key, features(i))
        _age(entry_path(store.root, _name(key)), 1000 * i)
    done = prune(store.root, older_than_s=1500)
    assert (done.entries, done.left) == (1, 2)
    assert done.freed_bytes > 0
    assert prune(store.root, max_bytes=0).left == 0
    assert files(store) == []


def test_an_entry_larger_than_the_bound_is_not_kept(tmp_path: Path):
    store = FeatureStore(tmp_path, max_bytes=100)
    store.put_tiles(KEY, features())
    assert "holds at most 100" in store.take_notes()[0]
    assert files(store) == []


def test_prune_removes_old_locks_that_nobody_holds(store: FeatureStore):
    other = replace(KEY, slide="00" * 32)
    with store.lock(KEY):
        with store.lock(other):
            pass
        for path in (store.root / "locks").iterdir():
            _age(path, ABANDONED_S + 1)
        prune(store.root)
        assert [p.stem for p in (store.root / "locks").iterdir()] == [_name(KEY)]


def test_prune_forgets_slides_that_nobody_asked_for(store: FeatureStore):
    memo = store.root / "slides"
    memo.mkdir(parents=True)
    for name in ("new", "old"):
        (memo / name).write_text("x")
    _age(memo / "old", FORGOTTEN_S + 1)
    prune(store.root)
    assert [p.name for p in memo.iterdir()] == ["new"]


def test_pruning_nothing_is_fine(tmp_path: Path):
    assert prune(tmp_path / "missing", max_bytes=0).entries == 0


# --- locks
HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_store import *
store = FeatureStore(Path(sys.argv[2]))
with store.lock(KEY, lambda: print("waiting", flush=True)) as waited:
    print("held", waited, store.notes, flush=True)
    time.sleep(float(sys.argv[3]))
"""


def hold(root: Path, seconds: float) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", HOLD, str(Path(__file__).parent), str(root), str(seconds)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_a_lock_goes_with_its_process(tmp_path: Path, how: signal.Signals):
    holder = hold(tmp_path, 600)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held False []\n"
    waiter = hold(tmp_path, 0)
    assert waiter.stdout is not None
    assert waiter.stdout.readline() == "waiting\n"
    assert waiter.poll() is None
    holder.send_signal(how)
    assert waiter.stdout.readline() == "held True []\n"
    assert waiter.wait(10) == 0
    holder.wait(10)
    for process in (holder, waiter):
        process.stdout.close()


def test_locks_of_other_keys_are_free(store: FeatureStore):
    with store.lock(KEY), store.lock(replace(KEY, slide="00" * 32)) as waited:
        assert not waited


def test_a_lock_is_free_after_an_error(store: FeatureStore):
    with pytest.raises(ZeroDivisionError), store.lock(KEY):
        raise ZeroDivisionError
    with FeatureStore(store.root).lock(KEY) as waited:
        assert not waited


# --- where, and how large
def test_the_place_is_the_environments_or_the_platforms(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WSI_RT_CACHE", "/somewhere/else")
    assert default_root() == Path("/somewhere/else")
    monkeypatch.delenv("WSI_RT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_root().name == "wsi-rt"
    if sys.platform == "linux":
        assert default_root() == Path("/xdg/wsi-rt")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("100", 100), ("1K", 1024), ("1.5k", 1536), ("20G", 20 << 30), ("2GiB", 2 << 30), ("3 MB", 3 << 20)],
)
def test_sizes(text: str, expected: int, monkeypatch: pytest.MonkeyPatch):
    assert parse_bytes(text) == expected
    monkeypatch.setenv("WSI_RT_CACHE_MAX_BYTES", text)
    assert bound_from_environment() == expected


@pytest.mark.parametrize("text", ["", "-1", "many", "nan", "inf", "G", "1e400", "9" * 30])
def test_no_sizes(text: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="expected a size"):
        parse_bytes(text)
    if text:
        monkeypatch.setenv("WSI_RT_CACHE_MAX_BYTES", text)
        with pytest.raises(InputError, match="WSI_RT_CACHE_MAX_BYTES is"):
            bound_from_environment()


def test_the_entry_tells_what_it_is_without_names(store: FeatureStore):
    store.put_tiles(KEY, features())
    (entry,) = [json.loads(p.read_text()) for p in files(store) if p.suffix == ".json"]
    assert set(entry) == {"check", "facts", "key", "sha256", "size"}
    assert set(entry["key"]) == {"slide", "reader", "grid", "encoder", "precision", "kind", "revision"}
    assert set(entry["facts"]) == {"tiles", "width", "created"}
