"""`synth-checkpoint`: every published layout, written as files and read back, is the same model to the last bit."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")
load_file = pytest.importorskip("safetensors.torch", reason="the export extra is not installed").load_file

from wsi_rt.export.layouts import DTYPES, LAYOUTS, plan, plan_layout, write_layout  # noqa: E402
from wsi_rt.export.layouts.lora_split import TARGETS  # noqa: E402
from wsi_rt.export.sources.checkpoint import Checkpoint, Sources, resolve  # noqa: E402
from wsi_rt.export.sources.files import open_weights  # noqa: E402
from wsi_rt.export.sources.presets import PRESETS  # noqa: E402
from wsi_rt.runtime.errors import InputError, MachineError  # noqa: E402

SEED = 5
FILES = {
    "merged": "llava/config.json llava/model-00001-of-0000N.safetensors llava/model.safetensors.index.json "
    "llava/tokenizer.json llava/tokenizer_config.json tile_encoder/model.safetensors",
    "merged-bin": "llava/config.json llava/pytorch_model-00001-of-0000N.bin llava/pytorch_model.bin.index.json "
    "llava/tokenizer.json llava/tokenizer_config.json tile_encoder/pytorch_model.bin",
    "lora": "llava/adapter_config.json llava/adapter_model.safetensors llava/config.json llava/non_lora_trainables.bin "
    "llava_base/config.json llava_base/model-00001-of-0000N.safetensors llava_base/model.safetensors.index.json "
    "llava_base/tokenizer.json llava_base/tokenizer_config.json tile_encoder/model.safetensors",
    "projector": "llava/mm_projector.bin llava_base/config.json llava_base/model-00001-of-0000N.safetensors "
    "llava_base/model.safetensors.index.json llava_base/tokenizer.json llava_base/tokenizer_config.json "
    "tile_encoder/model.safetensors",
}


def write(out: Path, layout: str, **options: Any) -> Path:
    write_layout(plan_layout("tiny", SEED, layout, out, **options))
    return out


def read(folder: Path) -> Checkpoint:
    return resolve(Sources(checkpoint=str(folder)))


def tensors(checkpoint: Checkpoint) -> dict[str, np.ndarray[Any, Any]]:
    return {
        f"{part}/{name}": checkpoint.parts[part].source.get(name)
        for part in checkpoint.parts
        for name in checkpoint.parts[part].config.tensors()
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_model(tiny_preset, tmp_path, layout, dtype):
    """Equal to `synthetic:<preset>` rounded to the stored dtype, bit by bit: a LoRA merge included."""
    checkpoint = read(write(tmp_path / "ck", layout, dtype=dtype))
    expected = resolve(Sources(checkpoint=f"{tiny_preset}?seed={SEED}"))
    assert {n: p.config for n, p in checkpoint.parts.items()} == {n: p.config for n, p in expected.parts.items()}
    assert not checkpoint.synthetic
    wanted = {n: torch.from_numpy(x).to(DTYPES[dtype]).float().numpy() for n, x in tensors(expected).items()}
    given = tensors(checkpoint)
    assert set(given) == set(wanted)
    assert [n for n in wanted if not np.array_equal(given[n], wanted[n])] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_are_the_published_ones(tiny_preset, tmp_path, layout):
    folder = write(tmp_path / "ck", layout)
    files = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    shards = {f for f in files if "-of-" in f}
    expected = {f for f in FILES[layout].split() if "-of-" not in f}
    assert files - shards == expected | {"tile_encoder/config.json", "slide_encoder/slide_encoder.pth"}
    assert len(shards) >= 2
    assert any(f"00001-of-{len(shards):05}" in f for f in shards)
    assert set(torch.load(folder / "slide_encoder/slide_encoder.pth", weights_only=True)) == {"model"}
    (index,) = folder.rglob("*.index.json")
    weight_map = json.loads(index.read_text())["weight_map"]
    assert {str((index.parent / f).relative_to(folder)) for f in weight_map.values()} == shards


@pytest.mark.parametrize("layout", ["merged", "merged-bin"])
def test_a_merged_release_holds_what_no_component_takes(tiny_preset, tmp_path, layout):
    folder = write(tmp_path / "ck", layout)
    assert any("vision_tower" in n for n in open_weights(folder / "llava").shapes())
    assert read(folder).parts["llm"].ignored == 3


def test_the_same_bytes_again_and_others_for_another_seed(tiny_preset, tmp_path):
    one, again = write(tmp_path / "a", "lora"), write(tmp_path / "b", "lora")
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert [f for f in files if (one / f).read_bytes() != (again / f).read_bytes()] == []
    write_layout(plan_layout("tiny", SEED + 1, "lora", tmp_path / "c"))
    first, other = tensors(read(one)), tensors(read(tmp_path / "c"))
    assert first.keys() == other.keys()
    assert not any(np.array_equal(x, other[n]) for n, x in first.items())


def test_shards_are_bounded(tiny_preset, tmp_path):
    """A tensor larger than the bound stands alone."""
    most = 20_000
    folder = write(tmp_path / "ck", "merged", shard_bytes=most)
    for path in (folder / "llava").glob("*.safetensors"):
        sizes = [t.nbytes for t in load_file(path).values()]
        assert sum(sizes) <= most or len(sizes) == 1
    assert read(folder).parts["llm"].source.get("lm_head.weight").nbytes > most


def test_the_plans_size_is_the_files(tiny_preset, tmp_path):
    for layout in LAYOUTS:
        planned = plan_layout("tiny", SEED, layout, tmp_path / layout, "bf16")
        write_layout(planned)
        weights = [p for p in (tmp_path / layout).rglob("*") if p.suffix in (".safetensors", ".bin", ".pth")]
        size = sum(p.stat().st_size for p in weights)
        assert planned.stored_bytes < size < planned.stored_bytes + 300 * 200  # names, shapes, padding


def test_the_published_size_is_planned_without_making_it(tmp_path):
    planned = plan_layout("wsi-llava-7b", 0, "merged", tmp_path / "ck", "fp16")
    assert 15.9e9 < planned.stored_bytes < 16.1e9  # (6.74 + 1.13 + 0.09 + 0.02) G parameters
    largest = max(p.stored_bytes(DTYPES["fp16"]) for p in planned.pieces if p.path.startswith("llava/"))
    assert largest <= plan.SHARD_BYTES


def test_without_the_adapter_it_is_another_model(tiny_preset, tmp_path):
    """Every projection the adapter targets differs from its base in as many rows as the rank."""
    folder = write(tmp_path / "ck", "lora")
    base, merged = open_weights(folder / "llava_base"), read(folder).parts["llm"].source
    rank = json.loads((folder / "llava" / "adapter_config.json").read_text())["r"]
    for name in merged.shapes():
        rows = (base.get(name) != merged.get(name)).reshape(len(base.get(name)), -1).any(axis=1).sum()
        assert rows == (rank if name.split(".")[-2] in TARGETS else 0), name


@pytest.mark.filterwarnings("ignore")
def test_transformers_and_peft_read_the_lora_layout(tiny_preset, tmp_path):
    """The libraries that the layout is made for: the base loads, the adapter attaches, and the merge is the model."""
    peft = pytest.importorskip("peft", reason="peft is not installed (the dev extra)")
    transformers = pytest.importorskip("transformers", reason="the export extra is not installed")
    folder = write(tmp_path / "ck", "lora")
    base = transformers.LlamaForCausalLM.from_pretrained(folder / "llava_base", dtype=torch.float32)
    merged = peft.PeftModel.from_pretrained(base, folder / "llava").merge_and_unload().state_dict()
    source = read(folder).parts["llm"].source
    assert set(merged) == set(source.shapes())
    assert all(np.array_equal(source.get(n), x.numpy()) for n, x in merged.items())


def test_transformers_reads_the_bin_layout(tiny_preset, tmp_path):
    """Its own reader of sharded .bin files, of the language model's part."""
    transformers = pytest.importorskip("transformers", reason="the export extra is not installed")
    folder = write(tmp_path / "ck", "merged-bin") / "llava"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    model = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    source = open_weights(folder)
    assert all(np.array_equal(source.get(n), x.numpy()) for n, x in model.state_dict().items())


def test_settings_that_are_not_the_published_ones_are_written(tmp_path, tiny, monkeypatch):
    slide = replace(tiny.slide_encoder, heads=8, segment_lengths=(64, 128), dilated_ratios=(1, 2), eps=1e-4)
    monkeypatch.setitem(PRESETS, "tiny", replace(tiny, slide_encoder=slide, llm=replace(tiny.llm, head_width=32)))
    parts = read(write(tmp_path / "ck", "projector")).parts
    assert parts["slide_encoder"].config == slide
    assert parts["llm"].config.head_width == 32


# Refused, or interrupted


def test_words_that_are_not_known(tmp_path):
    for options, words in (
        ({"preset": "huge"}, "--preset is 'huge', expected one of: nano"),
        ({"layout": "gguf"}, "--layout is 'gguf', expected one of: merged, merged-bin, lora, projector"),
        ({"dtype": "int8"}, "--dtype is 'int8', expected one of: fp32, bf16, fp16"),
        ({"seed": -1}, "--seed is -1"),
    ):
        with pytest.raises(InputError, match=words):
            plan_layout(**{"preset": "nano", "seed": 0, "layout": "merged", "out": tmp_path / "ck", **options})


def test_a_tile_encoder_without_a_published_config(tmp_path, tiny, monkeypatch):
    other = replace(tiny, tile_encoder=replace(tiny.tile_encoder, mlp="mlp", act="gelu"))
    monkeypatch.setitem(PRESETS, "tiny", other)
    with pytest.raises(InputError, match=r"tile encoder with \['act', 'mlp'\] has no DINOv2 config.json"):
        plan_layout("tiny", 0, "merged", tmp_path / "ck")


def test_a_folder_that_holds_something_is_left_alone(tiny_preset, tmp_path):
    (tmp_path / "ck").mkdir()
    (tmp_path / "ck" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for out in ("ck", "file"):
        with pytest.raises(InputError, match=r"exists and is not empty, .* choose another --out"):
            write(tmp_path / out, "merged")
    assert (tmp_path / "ck" / "mine").read_text() == "mine"
    (tmp_path / "ck" / "mine").unlink()
    assert read(write(tmp_path / "ck", "merged")).parts


def test_no_room_is_found_out_before(tiny_preset, tmp_path, monkeypatch):
    planned = plan_layout("tiny", SEED, "merged", tmp_path / "deep" / "ck")
    usage = shutil.disk_usage(tmp_path)._replace(free=planned.stored_bytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(MachineError, match=r"GB free, the checkpoint needs .* GB; choose another --out"):
        write_layout(planned)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "stopped"]
)
def test_half_a_checkpoint_is_never_seen(tiny_preset, tmp_path, monkeypatch, error):
    def fails(file: str) -> None:
        if "slide_encoder" in file:
            raise error

    with pytest.raises((MachineError, KeyboardInterrupt)):
        write_layout(plan_layout("tiny", SEED, "merged", tmp_path / "deep" / "ck"), fails)
    assert list(tmp_path.iterdir()) == []


# The whole path


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_command_says_what_builds_from_it(tiny_preset, wsi_rt, tmp_path, layout):
    out = tmp_path / "a folder"
    done = wsi_rt("synth-checkpoint", "--preset", "tiny", "--layout", layout, "--dtype", "bf16", "--out", out)
    assert done.code == 0
    assert "MB of bf16 weights in" in done.err
    command = shlex.split(done.out)
    assert command == ["wsi-rt", "build-engines", "--checkpoint", str(out), "--out", f"{out}-engines"]
    assert "nothing was written" in wsi_rt(*command[1:], "--dry-run").out


def test_the_command_refuses_in_one_line(wsi_rt, tmp_path):
    done = wsi_rt("synth-checkpoint", "--layout", "gguf", "--out", tmp_path / "ck")
    assert done.code == 2
    assert done.err == "wsi-rt: --layout is 'gguf', expected one of: merged, merged-bin, lora, projector\n"


QUESTION = "What is the histological grade?"


@pytest.fixture(scope="module")
def roomy(tiny: Any) -> Iterator[None]:
    """`tiny` with a context that a slide's 576 tokens fit into."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", replace(tiny, llm=replace(tiny.llm, context=1024)))
        yield


def answer(folder: Path, slide: Path) -> tuple[dict[str, str], tuple[int, ...]]:
    """(component digests, greedy tokens) of engines built from a checkpoint."""
    from wsi_rt.export.build import BuildRequest, build_engines, plan_build
    from wsi_rt.runtime.config import GenerationSettings
    from wsi_rt.runtime.pipeline import Pipeline

    bundle = folder.with_name(f"{folder.name}-engines")
    manifest = build_engines(plan_build(BuildRequest(Sources(checkpoint=str(folder)), bundle, threads=1)))
    with Pipeline.open(bundle, threads=1) as pipeline:
        told = pipeline.ask(slide, QUESTION, GenerationSettings(temperature=0.0, max_new_tokens=24))
    return {n: c.digest for n, c in manifest.components.items()}, tuple(told.token_ids)


@pytest.fixture(scope="module")
def by_merged(
    roomy: None, synth_slide: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, str], tuple[int, ...]]:
    return answer(write(tmp_path_factory.mktemp("merged") / "ck", "merged"), synth_slide)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "merged"])
def test_engines_of_every_layout_answer_alike(roomy, by_merged, synth_slide, tmp_path, layout):
    digests, tokens = answer(write(tmp_path / "ck", layout), synth_slide)
    assert len(tokens) == 24
    assert len(set(tokens)) > 4
    assert tokens == by_merged[1]
    assert digests == by_merged[0], "the engines are the same files"


@pytest.mark.slow
def test_a_wrong_merge_answers_otherwise(roomy, by_merged, synth_slide, tmp_path):
    """The comparison bites: the base without its adapter gives other engines and other tokens."""
    folder = write(tmp_path / "ck", "lora")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / "llava" / file).unlink()
    projector = torch.load(folder / "llava" / "non_lora_trainables.bin", weights_only=True)
    (folder / "llava" / "non_lora_trainables.bin").unlink()
    torch.save(
        {n.removeprefix("base_model.model."): x for n, x in projector.items()}, folder / "llava/mm_projector.bin"
    )
    digests, tokens = answer(folder, synth_slide)
    assert digests["projector"] == by_merged[0]["projector"]
    assert digests["llm"] != by_merged[0]["llm"]
    assert tokens != by_merged[1]
