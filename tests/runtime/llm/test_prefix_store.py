"""Prefixes in memory and on disk: what is kept, what goes, and that a reload changes nothing."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from wsi_rt.runtime.errors import InputError, MachineError, WsiRtError
from wsi_rt.runtime.llm.loop import Loop, drive
from wsi_rt.runtime.llm.prefix import SlidePrefix, slide_prefix
from wsi_rt.runtime.llm.prefix_disk import PrefixDisk
from wsi_rt.runtime.llm.prefix_store import PrefixStore
from wsi_rt.runtime.llm.request import Request
from wsi_rt.runtime.llm.tokenizer import Tokenizer

Asked = Callable[..., Request]


def answer(llama, tokenizer: Tokenizer, store: PrefixStore, request: Request) -> tuple[int, ...]:
    return tuple(drive(Loop(llama, tokenizer, store=store, speculate=False), [request])[0].token_ids)


def rows_computed(llama) -> int:
    return sum(map(sum, llama.calls))


@pytest.fixture
def disk(tmp_path: Path) -> PrefixDisk:
    return PrefixDisk(tmp_path / "prefixes")


# --- what a prefix is
def test_the_key_is_of_slide_text_and_model(llama, prompt) -> None:
    made = [
        slide_prefix(llama, before, projected, model)
        for before in ((1, 5), (1, 6))
        for projected in (prompt(3), prompt(3, seed=2), prompt(4))
        for model in ({}, {"precision": "int4"})
    ]
    assert len({p.key for p in made}) == 12
    assert slide_prefix(llama, (1, 5), prompt(3)).key == made[0].key
    np.testing.assert_array_equal(made[0].embeds, np.concatenate([llama.table[[1, 5]], prompt(3)]))


# --- in memory
def test_a_used_or_pinned_prefix_stays(llama, tokenizer: Tokenizer, slides: list[SlidePrefix], asked: Asked) -> None:
    store = PrefixStore(llama, max_bytes=0)
    answer(llama, tokenizer, store, asked(0, slides[0]))
    assert store.listed() == []  # no room for what nobody uses
    store = PrefixStore(llama, max_bytes=25 * llama.spec.kv_bytes_per_token)
    for slide in slides[:2]:
        answer(llama, tokenizer, store, asked(0, slide))
    assert [x.key for x in store.listed()] == [slides[1].key]
    store.pin(slides[1].key)
    answer(llama, tokenizer, store, asked(0, slides[0]))
    assert [(x.key, x.pinned, x.users) for x in store.listed()] == [
        (slides[0].key, False, 0),
        (slides[1].key, True, 0),
    ]
    assert store.acquire(slides[0]) is not None
    assert store.make_room(1 << 40) == 0
    with pytest.raises(InputError, match="in use"):
        store.drop(slides[0].key)
    store.release(slides[0].key)
    store.drop(slides[0].key)
    with pytest.raises(InputError, match="no prefix"):
        store.drop(slides[0].key)


# --- on disk
def test_a_restart_answers_from_disk_without_prefill(
    llama, tokenizer: Tokenizer, slides: list[SlidePrefix], asked: Asked, disk: PrefixDisk
) -> None:
    request = asked(0, slides[0])
    want = answer(llama, tokenizer, PrefixStore(llama, disk), request)
    llama.calls.clear()
    again = PrefixStore(llama, PrefixDisk(disk.folder))
    assert answer(llama, tokenizer, again, request) == want
    assert rows_computed(llama) == len(request.embeds) + len(want) - 1  # the question and its answer
    assert [(x.origin, x.length) for x in again.listed()] == [("disk", slides[0].length)]
    assert again.take_notes() == ()
    layers = disk.read(slides[0].key, slides[0].made_of)
    assert layers is not None
    assert not layers[0].flags.writeable
    assert isinstance(layers[0].base, np.memmap) or layers[0].base is not None


def test_fp16_is_rounded_before_its_first_use(
    llama, tokenizer: Tokenizer, slides: list[SlidePrefix], asked: Asked, disk: PrefixDisk
) -> None:
    stores = [PrefixStore(llama, disk, dtype="fp16") for _ in range(2)]
    kvs = []
    for store in stores:
        answer(llama, tokenizer, store, asked(0, slides[0]))
        kvs.append(store.acquire(slides[0]))
    assert [s.listed()[0].origin for s in stores] == ["computed", "disk"]
    for a, b in zip(*(kv.layers() for kv in kvs), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, a.astype(np.float16))
    exact = PrefixStore(llama, disk)  # another thing: not read from the narrow one
    answer(llama, tokenizer, exact, asked(0, slides[0]))
    assert exact.listed()[0].origin == "computed"
    sizes = {s.dtype: s.nbytes for s in disk.listed()}
    assert sizes["<f4"] - 4096 == 2 * (sizes["<f2"] - 4096) == slides[0].length * llama.spec.kv_bytes_per_token
    with pytest.raises(InputError, match="fp32 or fp16"):
        PrefixStore(llama, dtype="int8")


def test_what_does_not_fit_fp16_fails_the_question(
    llama, tokenizer: Tokenizer, slides: list[SlidePrefix], asked: Asked
) -> None:
    llama.layers[0]["v"] *= 1e6
    store = PrefixStore(llama, dtype="fp16")
    loop = Loop(llama, tokenizer, store=store)
    with pytest.raises(WsiRtError, match="--prefix-dtype fp32"):
        drive(loop, [asked(0, slides[0])])
    assert loop.scheduler.memory.held_bytes == 0
    assert not loop.scheduler.has_work


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "number": (lambda p: flip(p, 5000), "SHA-256"),
    "last byte": (lambda p: flip(p, -1), "SHA-256"),
    "header": (lambda p: flip(p, 40), "header"),
    "magic": (lambda p: flip(p, 0), "no prefix file"),
    "short": (lambda p: os.truncate(p, p.stat().st_size - 4), "cut short"),
    "long": (lambda p: os.truncate(p, p.stat().st_size + 4), "cut short"),
    "empty": (lambda p: p.write_bytes(b""), "no prefix file"),
    "foreign": (lambda p: p.write_text("hello" * 2000), "no prefix file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_dropped_told_and_written_again(
    llama, tokenizer: Tokenizer, slides: list[SlidePrefix], asked: Asked, disk: PrefixDisk, damage: str
) -> None:
    want = answer(llama, tokenizer, PrefixStore(llama, disk), asked(0, slides[0]))
    path = disk.folder / f"{slides[0].key}.prefix"
    whole = path.read_bytes()
    hurt, reason = DAMAGE[damage]
    hurt(path)
    store = PrefixStore(llama, disk)
    assert answer(llama, tokenizer, store, asked(0, slides[0])) == want
    (note,) = store.take_notes()
    assert reason in note
    assert "computed again" in note
    assert path.read_bytes()[4096:] == whole[4096:]


def test_a_file_of_another_slide_or_model_is_not_taken(
    llama, tokenizer: Tokenizer, slides: list[SlidePrefix], asked: Asked, disk: PrefixDisk
) -> None:
    answer(llama, tokenizer, PrefixStore(llama, disk), asked(0, slides[0]))
    (disk.folder / f"{slides[0].key}.prefix").rename(disk.folder / f"{slides[1].key}.prefix")
    store = PrefixStore(llama, disk)
    answer(llama, tokenizer, store, asked(0, slides[1]))
    assert "something else" in store.take_notes()[0]
    assert store.listed()[0].origin == "computed"


def test_a_file_of_other_shapes_is_not_taken(
    llama, tokenizer: Tokenizer, slides: list[SlidePrefix], asked: Asked, disk: PrefixDisk
) -> None:
    disk.write(slides[0].key, slides[0].made_of, [np.zeros((2, 5, 2, 8), np.float32)] * 2)
    store = PrefixStore(llama, disk)
    answer(llama, tokenizer, store, asked(0, slides[0]))
    assert "5 tokens, expected 20" in store.take_notes()[0]
    disk.write(slides[0].key, slides[0].made_of, [np.zeros((2, 20, 3, 8), np.float32)] * 2)
    store = PrefixStore(llama, disk)
    answer(llama, tokenizer, store, asked(0, slides[0]))
    assert "other shapes" in store.take_notes()[0]


def layers_of(seed: int, tokens: int = 100) -> list[np.ndarray]:
    return [np.random.default_rng(seed).standard_normal((2, tokens, 2, 8)).astype(np.float32) for _ in range(2)]


def test_the_least_recently_used_go_and_pinned_ones_stay(tmp_path: Path) -> None:
    size = 4096 + 2 * layers_of(0)[0].nbytes
    disk = PrefixDisk(tmp_path, max_bytes=3 * size)
    for i, key in enumerate("abc"):
        disk.write(key, {}, layers_of(i))
        os.utime(tmp_path / f"{key}.prefix", (i, i))
    disk.pin("a")
    assert disk.read("b", {}) is not None  # used just now
    disk.write("d", {}, layers_of(4))
    assert {s.key: s.pinned for s in disk.listed()} == {"a": True, "b": False, "d": False}
    disk.pin("a", pinned=False)
    disk.write("e", {}, layers_of(5))
    assert {s.key for s in disk.listed()} == {"b", "d", "e"}
    small = PrefixDisk(tmp_path / "small", max_bytes=size - 1)
    small.write("a", {}, layers_of(0))
    assert small.listed() == []
    assert "holds at most" in small.take_notes()[0]


def test_keys_may_be_cut_and_must_be_one(tmp_path: Path) -> None:
    disk = PrefixDisk(tmp_path)
    for key in ("abc1", "abc2", "xyz"):
        disk.write(key, {}, layers_of(0))
    assert disk.drop("x") > 0
    for start, told in (("abc", "2 prefixes begin"), ("q", "no prefix begins"), ("", "no prefix begins")):
        with pytest.raises(InputError, match=told):
            disk.drop(start)
    disk.drop("abc1")
    assert [s.key for s in disk.listed()] == ["abc2"]


def test_listing_tells_of_damaged_files(tmp_path: Path) -> None:
    disk = PrefixDisk(tmp_path)
    disk.write("good", {"slide": "s"}, layers_of(0))
    (tmp_path / "bad.prefix").write_text("hello")
    (tmp_path / "other.txt").write_text("hello")
    found = {s.key: s for s in disk.listed()}
    assert set(found) == {"good", "bad"}
    assert (found["good"].length, found["good"].problem, dict(found["good"].made_of or {})) == (
        100,
        None,
        {"slide": "s"},
    )
    assert found["bad"].problem == "no prefix file"
    assert PrefixDisk(tmp_path / "nowhere").listed() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_costs_nothing_but_a_note(llama, slides, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    store = PrefixStore(llama, PrefixDisk(tmp_path / "prefixes"))
    kv = llama.new_kv(20)
    llama.prefill(kv, slides[0].embeds)
    store.add(slides[0], llama.freeze(kv))
    assert "not kept on disk" in store.take_notes()[0]
    tmp_path.chmod(0o700)


def test_a_full_disk_leaves_nothing_half_written(
    llama, slides: list[SlidePrefix], disk: PrefixDisk, monkeypatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    store = PrefixStore(llama, disk)
    kv = llama.new_kv(20)
    llama.prefill(kv, slides[0].embeds)
    monkeypatch.setattr("wsi_rt.runtime.llm.prefix_disk._bytes_of", full)
    store.add(slides[0], llama.freeze(kv))
    assert "no room to write" in store.take_notes()[0]
    assert [p.name for p in disk.folder.iterdir() if "prefix" in p.name] == []
    assert store.acquire(slides[0]) is not None  # it is in memory all the same
    with pytest.raises(MachineError, match="no room"):
        disk.write("x", {}, layers_of(0))


def _write(folder: str, seed: int) -> None:
    disk = PrefixDisk(Path(folder), max_bytes=5 * (4096 + 2 * layers_of(0)[0].nbytes))
    for i in range(10):
        disk.write(f"{(seed + i) % 8:064d}", {"n": (seed + i) % 8}, layers_of((seed + i) % 8))


def test_processes_share_a_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write, args=(str(tmp_path), seed)) for seed in (0, 3)]
    for p in processes:
        p.start()
    disk = PrefixDisk(tmp_path)
    while any(p.is_alive() for p in processes):
        for n in range(8):
            found = disk.read(f"{n:064d}", {"n": n})
            assert found is None or np.array_equal(found[1], layers_of(n)[1])
    assert [p.exitcode for p in processes] == [0, 0]
    assert disk.take_notes() == []
    assert 0 < len(disk.listed()) <= 5
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_reader_goes_on_when_the_file_is_dropped(tmp_path: Path) -> None:
    disk = PrefixDisk(tmp_path)
    disk.write("a", {}, layers_of(0))
    layers = disk.read("a", {})
    thread = threading.Thread(target=disk.drop, args=("a",))
    thread.start()
    thread.join()
    assert layers is not None
    np.testing.assert_array_equal(layers[1], layers_of(0)[1])
    assert disk.read("a", {}) is None
    assert disk.take_notes() == []  # it is gone, not damaged


def test_nothing_of_the_slide_but_digests_is_stored(
    llama, tokenizer: Tokenizer, slides: list[SlidePrefix], asked: Asked, disk: PrefixDisk
) -> None:
    answer(llama, tokenizer, PrefixStore(llama, disk), asked(0, slides[0]))
    header = (disk.folder / f"{slides[0].key}.prefix").read_bytes()[:4096]
    fields = json.loads(header[8:].rstrip(b"\0"))
    assert set(fields) == {"schema", "key", "made_of", "dtype", "shape", "sha256", "created", "check"}
    assert set(fields["made_of"]) == {"slide", "before", "model"}
    assert oct(disk.folder.stat().st_mode & 0o777) == "0o700"
