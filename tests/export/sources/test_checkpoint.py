"""Checkpoints as the ecosystem lays them out (SPEC 6): read end to end, or refused by what is wrong with them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("onnx", reason="the export extra is not installed")
pytest.importorskip("transformers", reason="the export extra is not installed")
load_file = pytest.importorskip("safetensors.numpy", reason="the export extra is not installed").load_file

from wsi_rt.export.arch import LlamaConfig, ProjectorConfig  # noqa: E402
from wsi_rt.export.build import BuildRequest, build_engines, is_up_to_date, plan_build  # noqa: E402
from wsi_rt.export.models import reference_model  # noqa: E402
from wsi_rt.export.sources.checkpoint import Sources, resolve  # noqa: E402
from wsi_rt.export.sources.files import open_weights  # noqa: E402
from wsi_rt.export.sources.llama_json import llama_config  # noqa: E402
from wsi_rt.export.sources.llava import projector_config  # noqa: E402
from wsi_rt.export.sources.synthetic import SyntheticSource, uniform  # noqa: E402
from wsi_rt.runtime.bundle import Bundle  # noqa: E402
from wsi_rt.runtime.errors import CheckpointError, InputError  # noqa: E402

SHARED_TOKENIZER = Path(__file__).resolve().parents[3].parent / "shared/data/llm/llama2_tokenizer.model"


def all_of(checkpoint) -> Sources:
    return Sources(checkpoint=str(checkpoint.root))


def build(sources: Sources, out: Path, **request: Any):
    return build_engines(plan_build(BuildRequest(sources, out, threads=1, **request)))


def refused(sources: Sources, out: Path, *words: str) -> None:
    """The plan is refused with one line that has every word, and nothing is written."""
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(CheckpointError) as e:
        build(sources, out)
    message = str(e.value)
    assert [w for w in words if w not in message] == [], message
    assert "\n" not in message
    assert e.value.exit_code == 2
    assert sorted(out.parent.rglob("*")) == before


# A checkpoint that is right


def test_engines_equal_the_torch_reference(checkpoint, tmp_path):
    """Three folders -> resolve -> graphs -> bundle -> engines, on inputs that no gate has seen."""
    manifest = build(all_of(checkpoint), tmp_path / "bundle")
    assert tuple(manifest.components) == ("tile_encoder", "slide_encoder", "projector", "llm")
    assert not manifest.source["synthetic"]
    configs = checkpoint.preset.components()
    torch_inputs = {
        "tile_encoder": [np.random.default_rng(0).integers(0, 256, (3, 256, 256, 3), dtype=np.uint8)],
        "slide_encoder": [
            uniform(1, "features", 700 * 32, -2, 2).reshape(700, 32),
            np.stack(np.divmod(np.arange(700), 20), axis=1)[:, ::-1].copy(),
        ],
        "projector": [uniform(1, "tokens", 576 * 96, -2, 2).reshape(576, 96)],
    }
    with Bundle.open(tmp_path / "bundle", threads=1).decoder() as decoder, torch.inference_mode():
        bundle = Bundle.open(tmp_path / "bundle", threads=1)
        for name, arrays in torch_inputs.items():
            module = reference_model(configs[name], SyntheticSource(configs[name], "tiny", checkpoint.seed))
            expected = module(*map(torch.from_numpy, arrays))
            expected = expected["tokens"] if isinstance(expected, dict) else expected
            with bundle.engine(name) as engine:
                inputs = dict(zip((s.name for s in engine.manifest.inputs), arrays, strict=True))
                out = engine.run(inputs)[engine.manifest.outputs[0].name]
            assert np.abs(out - expected.numpy()).max() <= 1e-4, name
        llm = reference_model(configs["llm"], SyntheticSource(configs["llm"], "tiny", checkpoint.seed))
        embeds = uniform(1, "embeds", 40 * 64, -1, 1).reshape(40, 64)
        expected = llm(inputs_embeds=torch.from_numpy(embeds)[None]).logits[0, -1].numpy()
        assert np.abs(decoder.prefill(decoder.new_kv(64), embeds) - expected).max() <= 1e-4


def test_what_is_left_out_is_counted(checkpoint):
    """CLIP's tower and rotary tables in a merged checkpoint are unused (SPEC 6)."""
    part = resolve(Sources(llava=str(checkpoint.llava))).parts["llm"]
    assert part.ignored == 2


def test_the_shapes_win_over_mm_hidden_size(checkpoint):
    """SPEC 4: mm_hidden_size is wrong in some releases."""
    assert json.loads((checkpoint.llava / "config.json").read_text())["mm_hidden_size"] == 512
    parts = resolve(all_of(checkpoint)).parts
    assert parts["projector"].config.widths == (96, 48, 64)
    assert parts["slide_encoder"].config.padded == 96


def test_projector_only_gives_the_merged_engines(checkpoint, tmp_path):
    """(c) of SPEC 6: the projector's file over a base folder, as a folder or as a file, either key style."""
    merged = build(Sources(llava=str(checkpoint.llava)), tmp_path / "merged")
    checkpoint.write_base(tmp_path / "base", model_type="llama")
    projector = checkpoint.tensors["projector"]
    checkpoint.save(tmp_path / "projector" / "mm_projector.safetensors", projector)
    short = {name.removeprefix("model."): x for name, x in projector.items()}
    checkpoint.save(tmp_path / "short.safetensors", short)
    for given in ("projector", "short.safetensors"):
        sources = Sources(llava=str(tmp_path / given), llava_base=str(tmp_path / "base"))
        apart = build(sources, tmp_path / f"apart-{given}")
        assert {n: c.digest for n, c in apart.components.items()} == {n: c.digest for n, c in merged.components.items()}
        assert apart.tokenizer == merged.tokenizer


def test_a_projector_beside_the_base_wins(checkpoint, tmp_path):
    """Stage 3's projector over a folder that holds stage 2's."""
    other = {name: 2 * x for name, x in checkpoint.tensors["projector"].items()}
    checkpoint.save(tmp_path / "mm_projector.safetensors", {n.removeprefix("model."): x for n, x in other.items()})
    sources = Sources(llava=str(tmp_path / "mm_projector.safetensors"), llava_base=str(checkpoint.llava))
    source = resolve(sources).parts["projector"].source
    assert all(np.array_equal(source.get(name), x) for name, x in other.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_checkpoints_are_read_as_fp32(checkpoint, dtype):
    from safetensors.torch import save_file

    tensors = {n: torch.from_numpy(x).to(dtype) for n, x in checkpoint.tensors["slide_encoder"].items()}
    path = checkpoint.slide / "slide_encoder.safetensors"
    save_file(tensors, str(path))
    source = resolve(all_of(checkpoint)).parts["slide_encoder"].source
    x = source.get("patch_embed.proj.weight")
    assert x.dtype == np.float32
    assert np.array_equal(x, tensors["patch_embed.proj.weight"].float().numpy())


def test_slide_encoder_settings_stand_beside_its_weights(checkpoint):
    checkpoint.write_slide(heads=8, segment_lengths=[64, 128], dilated_ratios=[1, 2], eps=1e-4, model_type="x")
    config = resolve(all_of(checkpoint)).parts["slide_encoder"].config
    assert (config.heads, config.segment_lengths, config.dilated_ratios) == (8, (64, 128), (1, 2))
    assert (config.eps, config.depth, config.width, config.ffn) == (1e-4, 2, 64, 128)


def test_published_spellings_of_the_slide_encoders_settings(checkpoint):
    """golden/longnet/tiny.json's names, every one read or held against the weights."""
    published = json.loads((Path(__file__).parents[2] / "golden/longnet/tiny.json").read_text())["config"]
    c = checkpoint.preset.slide_encoder
    sizes = {"in_chans": c.in_width, "embed_dim": c.width, "depth": c.depth, "ffn_dim": c.ffn}
    checkpoint.write_slide(**{**published, **sizes, "heads": 8, "norm_eps": 1e-3, "layer_norm_eps": 1e-4})
    config = resolve(all_of(checkpoint)).parts["slide_encoder"].config
    expected = replace(
        c,
        heads=8,
        segment_lengths=(1024, 1448, 2048, 2896, 4096),
        dilated_ratios=(1, 2, 4, 8, 16),
        eps=1e-4,
        pool_eps=1e-3,
    )
    assert config == expected


def test_segments_follow_the_slides_size(checkpoint):
    """SPEC 3's rule, when the list itself is not given."""
    for given, segments in (
        ({"max_wsi_size": 262144, "tile_size": 256}, (1024, 5792, 32768, 185363, 1048576)),
        ({"max_wsi_size": 262144}, (1024, 5792, 32768, 185363, 1048576)),
        ({"max_wsi_size": 16384, "tile_size": 256}, (1024, 1448, 2048, 2896, 4096)),
        ({"tile_size": 4096}, (1024, 1448, 2048, 2896, 4096)),
        ({"tile_size": 512, "segment_length": [8, 16, 32, 64, 128]}, (8, 16, 32, 64, 128)),
    ):
        checkpoint.write_slide(**given)
        assert resolve(all_of(checkpoint)).parts["slide_encoder"].config.segment_lengths == segments


def test_config_json_beside_a_slide_encoder_file_is_read(checkpoint):
    checkpoint.write_slide(heads=8)
    path = checkpoint.slide / "slide_encoder.safetensors"
    assert resolve(Sources(slide_encoder=str(path))).parts["slide_encoder"].config.heads == 8


def test_a_tile_encoders_config_beside_a_slide_encoder_is_not_its_own(checkpoint):
    """Prov-GigaPath's repository holds both encoders in one folder; its config.json is timm's."""
    path = checkpoint.tile / "slide_encoder.safetensors"
    checkpoint.save(path, checkpoint.tensors["slide_encoder"])
    assert resolve(Sources(slide_encoder=str(path))).parts["slide_encoder"].config.heads == 16


def test_a_single_flag_is_enough(checkpoint, tmp_path):
    manifest = build(Sources(slide_encoder=str(checkpoint.slide / "slide_encoder.safetensors")), tmp_path / "bundle")
    assert tuple(manifest.components) == ("slide_encoder",)
    assert manifest.tokenizer == {}


def test_published_tokenizer(checkpoint, tmp_path):
    """A sentencepiece model beside the weights is converted; one too large for the model is refused first."""
    if not SHARED_TOKENIZER.is_file():
        pytest.skip(f"{SHARED_TOKENIZER} is not here")
    pytest.importorskip("sentencepiece", reason="the export extra is not installed")
    (checkpoint.llava / "tokenizer.model").write_bytes(SHARED_TOKENIZER.read_bytes())
    out = tmp_path / "bundle"
    with pytest.raises(InputError, match="a tokenizer of 32000 tokens for a language model of 512"):
        build(Sources(llava=str(checkpoint.llava)), out)
    assert not out.exists()
    wide = replace(checkpoint.preset.llm, vocab=32000)
    checkpoint.preset = replace(checkpoint.preset, llm=wide)
    checkpoint.__post_init__()
    checkpoint.write_llava(vocab_size=32000)
    (checkpoint.llava / "tokenizer.model").write_bytes(SHARED_TOKENIZER.read_bytes())
    manifest = build(Sources(llava=str(checkpoint.llava)), out)
    assert manifest.tokenizer["source"]["name"] == "tokenizer.model"
    assert Bundle.open(out, threads=1).tokenizer().encode("USER: ")[-1] == 29871


# Changes that make another build


@pytest.mark.parametrize("change", ["rms_norm_eps", "tokenizer", "weights", "nothing"])
def test_every_input_of_a_build_is_part_of_its_identity(checkpoint, tmp_path, change):
    """config.json and the tokenizer decide as much as the weights do."""
    sources, out = Sources(llava=str(checkpoint.llava)), tmp_path / "bundle"
    build(sources, out)
    if change == "rms_norm_eps":
        checkpoint.write_llava(rms_norm_eps=1e-3)
    elif change == "tokenizer":
        path = checkpoint.llava / "tokenizer.json"
        path.write_text(path.read_text().replace('"▁the"', '"▁teh"'))
    elif change == "weights":
        checkpoint.tensors["llm"]["model.norm.weight"] += 1
        checkpoint.write_llava()
    plan = plan_build(BuildRequest(sources, out))
    if change == "nothing":
        assert is_up_to_date(plan)
        return
    with pytest.raises(InputError, match=r"another build.*--force"):
        is_up_to_date(plan)


# Checkpoints that are wrong


def test_missing_unexpected_and_misshapen_tensors_are_named(checkpoint, tmp_path):
    tensors = checkpoint.tensors["slide_encoder"]
    del tensors["encoder.layers.1.ffn.fc2.bias"]
    tensors["encoder.layers.1.ffn.fc9.bias"] = np.zeros(3, np.float32)
    tensors["cls_token"] = np.zeros((1, 1, 63), np.float32)
    checkpoint.write_slide()
    refused(
        all_of(checkpoint),
        tmp_path / "bundle",
        "1 missing (encoder.layers.1.ffn.fc2.bias)",
        "1 unexpected (encoder.layers.1.ffn.fc9.bias)",
        "1 misshapen (cls_token [1, 1, 63], expected [1, 1, 64])",
    )


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("tile_encoder", "blocks.1.ls2.gamma"),
        ("slide_encoder", "norm.bias"),
        ("projector", "model.mm_projector.2.weight"),
        ("projector", "model.mm_projector.0.bias"),
        ("llm", "model.layers.1.mlp.up_proj.weight"),
        ("llm", "lm_head.weight"),
    ],
)
def test_one_tensor_less(checkpoint, tmp_path, component, name):
    del checkpoint.tensors[component][name]
    checkpoint.write()
    refused(all_of(checkpoint), tmp_path / "bundle", "missing", name)


def test_a_long_list_of_tensors_is_counted(checkpoint, tmp_path):
    checkpoint.tensors["llm"] = {n: x for n, x in checkpoint.tensors["llm"].items() if "layers.1" not in n}
    checkpoint.write_llava()
    refused(all_of(checkpoint), tmp_path / "bundle", "9 missing (model.layers.1.input_layernorm.weight", ", ...)")


def test_more_layers_than_config_json_says(checkpoint, tmp_path):
    checkpoint.write_llava(num_hidden_layers=1)
    refused(all_of(checkpoint), tmp_path / "bundle", "9 unexpected", "model.layers.1.")


def test_a_layer_missing_in_the_middle_of_the_slide_encoder(checkpoint, tmp_path):
    tensors = checkpoint.tensors["slide_encoder"]
    checkpoint.tensors["slide_encoder"] = {n.replace("layers.1.", "layers.2."): x for n, x in tensors.items()}
    checkpoint.write_slide()
    refused(all_of(checkpoint), tmp_path / "bundle", "missing (encoder.layers.1.")


def test_a_missing_shard(checkpoint, tmp_path):
    (checkpoint.llava / "model-00002-of-00002.safetensors").unlink()
    refused(all_of(checkpoint), tmp_path / "bundle", "model-00002-of-00002.safetensors", "1 of 2", "download")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999], ids=str)
def test_a_truncated_shard(checkpoint, tmp_path, keep):
    path = checkpoint.llava / "model-00001-of-00002.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    refused(all_of(checkpoint), tmp_path / "bundle", str(path), "not a readable safetensors file", "download")


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}', '{"weight_map": {"a": [1]}}', "\xff"],
    ids=["cut", "list", "empty", "number", "list-map", "list-name", "binary"],
)
def test_a_corrupt_index(checkpoint, tmp_path, index):
    (checkpoint.llava / "model.safetensors.index.json").write_bytes(index.encode("latin-1"))
    refused(all_of(checkpoint), tmp_path / "bundle", "model.safetensors.index.json")


def test_an_index_that_names_a_number(checkpoint, tmp_path):
    (checkpoint.llava / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    refused(all_of(checkpoint), tmp_path / "bundle", "shard 1 is missing")


def test_a_tensor_in_two_shards(checkpoint, tmp_path):
    path = checkpoint.llava / "model-00002-of-00002.safetensors"
    checkpoint.save(path, {**load_file(path), "model.embed_tokens.weight": np.zeros((512, 64), np.float32)})
    refused(all_of(checkpoint), tmp_path / "bundle", "model.embed_tokens.weight stands in model-00001")


def test_several_files_without_an_index(checkpoint, tmp_path):
    (checkpoint.llava / "model.safetensors.index.json").unlink()
    refused(all_of(checkpoint), tmp_path / "bundle", "2 .safetensors files", "index of shards")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen3"}, ["'qwen3' is not supported", "llama"]),
        ({"model_type": "llava_qwen"}, ["'llava_qwen' is not supported"]),
        ({"model_type": None}, ["None is not supported"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "linear", "not supported"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["rope_scaling", "llama3"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ["rope_parameters", "yarn"]),
        ({"rope_scaling": "linear"}, ["rope_scaling", "not an object"]),
        ({"attention_bias": True}, ["attention_bias = True"]),
        ({"mlp_bias": True}, ["mlp_bias = True"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'"]),
        ({"sliding_window": 4096}, ["sliding_window = 4096"]),
        ({"num_attention_heads": 0}, ["num_attention_heads = 0, expected a whole number of at least 1"]),
        ({"num_attention_heads": None}, ["config.json lacks num_attention_heads"]),
        ({"num_attention_heads": 4.0}, ["num_attention_heads = 4.0, expected a whole number"]),
        ({"num_hidden_layers": True}, ["num_hidden_layers = True, expected a whole number"]),
        ({"max_position_embeddings": "256"}, ["max_position_embeddings = '256', expected a whole number"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads = 3, expected a divisor of the 4 heads"]),
        ({"num_key_value_heads": 0}, ["num_key_value_heads = 0"]),
        ({"num_attention_heads": 5, "head_dim": 16}, ["num_attention_heads = 5", "a divisor of hidden_size 64"]),
        ({"head_dim": 8}, ["head_dim = 8, expected a multiple of 16"]),
        ({"head_dim": 0}, ["head_dim = 0"]),
        ({"rms_norm_eps": "tiny"}, ["rms_norm_eps = 'tiny', expected a number above 0"]),
        ({"rms_norm_eps": 0}, ["rms_norm_eps = 0, expected a number above 0"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps = nan"]),
        ({"rope_theta": "1e4"}, ["rope_theta = '1e4'"]),
        ({"rope_parameters": {"rope_theta": True}}, ["rope_parameters: rope_theta = True"]),
        ({"tie_word_embeddings": "no"}, ["tie_word_embeddings = 'no', expected true or false"]),
        ({"model_type": ["llama"]}, ["['llama'] is not supported"]),
        ({"vocab_size": 511}, ["misshapen (model.embed_tokens.weight [512, 64], expected [511, 64]"]),
        ({"num_key_value_heads": 4}, ["misshapen (model.layers.0.self_attn.k_proj.weight [32, 64], expected [64, 64]"]),
        ({"tie_word_embeddings": True}, ["unexpected (lm_head.weight)"]),
    ],
    ids=lambda x: "-".join(f"{k}={v}" for k, v in x.items()) if isinstance(x, dict) else "",
)
def test_language_models_that_do_not_fit(checkpoint, tmp_path, changes, words):
    checkpoint.write_llava(**changes)
    refused(all_of(checkpoint), tmp_path / "bundle", str(checkpoint.llava), *words)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff"], ids=["empty", "cut", "list", "binary"])
def test_a_corrupt_config(checkpoint, tmp_path, text):
    (checkpoint.llava / "config.json").write_bytes(text.encode("latin-1"))
    refused(all_of(checkpoint), tmp_path / "bundle", "config.json")


def test_no_config(checkpoint, tmp_path):
    (checkpoint.llava / "config.json").unlink()
    refused(all_of(checkpoint), tmp_path / "bundle", "config.json: not readable")


@pytest.mark.parametrize("missing", ["tokenizer.json", None])
def test_no_tokenizer_is_found_out_before_building(checkpoint, tmp_path, missing):
    path = checkpoint.llava / "tokenizer.json"
    path.unlink() if missing else path.write_text("{")
    refused(all_of(checkpoint), tmp_path / "bundle", "tokenizer")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"heads": 7}, ["width 64 with 7 heads do not fit"]),
        ({"heads": 0}, ["heads = 0, expected a whole number of at least 1"]),
        ({"heads": "16"}, ["heads = '16'"]),
        ({"heads": 16.0}, ["heads = 16.0, expected a whole number"]),
        ({"heads": True}, ["heads = True"]),
        ({"heads": None}, ["heads = None"]),
        ({"segment_lengths": [64]}, ["1 segment lengths for 5 ratios"]),
        ({"segment_lengths": 64}, ["segment_lengths = 64, expected a list of whole numbers"]),
        ({"segment_lengths": [1024.5, 2], "dilated_ratios": [1, 2]}, ["segment_lengths = [1024.5, 2]"]),
        ({"segment_length": [True, 2], "dilated_ratio": [1, 2]}, ["segment_length = [True, 2]"]),
        ({"segment_lengths": [], "dilated_ratios": []}, ["segment_lengths = []"]),
        ({"dilated_ratios": [1, 2, 4, 8, 0]}, ["dilated_ratios = [1, 2, 4, 8, 0]"]),
        ({"pool_eps": None}, ["pool_eps = None, expected a number above 0"]),
        ({"eps": "1e-5"}, ["eps = '1e-5', expected a number above 0"]),
        ({"norm_eps": float("inf")}, ["norm_eps = inf"]),
        ({"layer_norm_eps": -1e-5}, ["layer_norm_eps = -1e-05"]),
        ({"eps": 1e-5, "layer_norm_eps": 1e-6}, ["eps = 1e-05, expected layer_norm_eps = 1e-06 again"]),
        ({"max_wsi_size": 128, "tile_size": 256}, ["max_wsi_size = 128, expected 1 to 2^20 times tile_size 256"]),
        ({"max_wsi_size": 2**60}, ["max_wsi_size = 1152921504606846976"]),
        ({"eps": 10**400}, ["eps = 1000"]),
        ({"heads": 2**64}, ["heads = 18446744073709551616"]),
        ({"max_wsi_size": 16384.0}, ["max_wsi_size = 16384.0"]),
        (
            {"max_wsi_size": 16384, "segment_length": [1, 2, 3, 4, 5]},
            ["[1, 2, 3, 4, 5]", "[1024, 1448, 2048, 2896, 4096]", "keep one"],
        ),
        ({"slide_ngrids": 2000}, ["slide_ngrids = 2000, expected 1000"]),
        ({"in_chans": 1536}, ["in_chans = 1536, expected 32 (as the weights are)"]),
        ({"embed_dim": 64.0}, ["embed_dim = 64.0, expected 64"]),
        ({"depth": 12}, ["depth = 12, expected 2"]),
        ({"ffn_dim": 3072}, ["ffn_dim = 3072, expected 128"]),
        ({"unrelated": "x", "dropout": 0.1}, ["dropout = 0.1, unrelated = 'x'", "not known"]),
    ],
    ids=str,
)
def test_slide_encoder_settings_that_do_not_fit(checkpoint, tmp_path, settings, words):
    checkpoint.write_slide(**settings)
    refused(all_of(checkpoint), tmp_path / "bundle", str(checkpoint.slide / "config.json"), *words)


def test_not_a_slide_encoder(checkpoint, tmp_path):
    checkpoint.save(checkpoint.slide / "slide_encoder.safetensors", {"x": np.zeros(3, np.float32)})
    refused(all_of(checkpoint), tmp_path / "bundle", "not a LongNet slide encoder", "patch_embed.proj.weight")


def test_components_that_do_not_fit_each_other(checkpoint, tmp_path):
    llm, projector, slide = (checkpoint.preset.components()[n] for n in ("llm", "projector", "slide_encoder"))

    def with_projector(*widths: int) -> None:
        source = SyntheticSource(ProjectorConfig(widths), "tiny", 0)
        checkpoint.tensors["projector"] = {n: source.get(n) for n in source.shapes()}
        checkpoint.write_llava()

    with_projector(96, 48, llm.hidden + 8)
    refused(all_of(checkpoint), tmp_path / "bundle", "projector gives 72 numbers, llm takes 64")
    with_projector(slide.width - 4, 48, llm.hidden)
    refused(all_of(checkpoint), tmp_path / "bundle", "slide encoder of width 64", "projector that takes 60")
    with_projector(*projector.widths)
    source = SyntheticSource(replace(slide, in_width=48), "tiny", 0)
    checkpoint.tensors["slide_encoder"] = {n: source.get(n) for n in source.shapes()}
    checkpoint.write_slide()
    refused(all_of(checkpoint), tmp_path / "bundle", "tile_encoder gives 32 numbers, slide_encoder takes 48")
    source = SyntheticSource(replace(slide, norm_width=80), "tiny", 0)
    checkpoint.tensors["slide_encoder"] = {n: source.get(n) for n in source.shapes()}
    checkpoint.write_slide()
    refused(all_of(checkpoint), tmp_path / "bundle", "norm of 80", "projector that takes 96")


@pytest.mark.parametrize(
    "word",
    [
        "synthetic:",
        "synthetic:huge",
        "synthetic:nano?",
        "synthetic:nano?seed=",
        "synthetic:nano?seed=-1",
        "synthetic:nano?seed=1.5",
        "synthetic:nano?seed=x",
        "synthetic:nano?seed=1&depth=2",
        "synthetic:nano?depth=2",
        "synthetic:nano?seed=1111111111111111111",
        "synthetic:nano?seed=\u0661",
    ],
)
def test_synthetic_grammar(tmp_path, word):
    if word == "synthetic:nano?":
        assert resolve(Sources(checkpoint=word)).label == "synthetic:nano?seed=0"
        return
    refused(Sources(checkpoint=word), tmp_path / "bundle", repr(word), "synthetic:<preset>?seed=N", "nano")


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        (Sources(), ["no checkpoint given", "--checkpoint"]),
        (Sources(checkpoint="nowhere"), ["nowhere", "synthetic:<preset>"]),
        (Sources(tile_encoder="nowhere"), ["nowhere", "no such file", "tile encoder"]),
        (Sources(slide_encoder="nowhere"), ["nowhere", "slide encoder"]),
        (Sources(llava="nowhere"), ["nowhere", "LLaVA"]),
    ],
)
def test_sources_that_are_not_there(tmp_path, monkeypatch, sources, words):
    monkeypatch.chdir(tmp_path)
    refused(sources, tmp_path / "bundle", *words)


def test_a_base_belongs_to_projector_weights(tmp_path):
    refused(
        Sources(checkpoint="synthetic:nano", llava_base="base"),
        tmp_path / "bundle",
        "--llava-base base goes with a LoRA adapter or projector weights, not with synthetic:nano",
    )


def test_flags_beside_the_checkpoint_win(checkpoint, tmp_path):
    other = tmp_path / "other.safetensors"
    checkpoint.save(other, checkpoint.tensors["slide_encoder"])
    parts = resolve(Sources(checkpoint=str(checkpoint.root), slide_encoder=str(other))).parts
    assert parts["slide_encoder"].source.label == str(other)
    assert parts["llm"].source.label == str(checkpoint.llava)


def test_unknown_component_and_precision(checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"--components has 'head', expected some of: tile_encoder, slide_encoder"):
        plan_build(BuildRequest(all_of(checkpoint), tmp_path / "b", components=("head",)))
    for precision in ("int2", "tile_encoder=int4", "head=fp32", "llm=", "=fp32"):
        with pytest.raises(InputError, match=r"--precision"):
            plan_build(BuildRequest(all_of(checkpoint), tmp_path / "b", precision=precision))
    with pytest.raises(InputError, match="target is 'abacus', expected one of: ort-cpu"):
        plan_build(BuildRequest(all_of(checkpoint), tmp_path / "b", target="abacus"))


# Readers on their own


def test_projector_kinds(tmp_path):
    """SPEC 4: linear and mlp{n}x_gelu, told by the weights."""
    for widths, kind in (((96, 32), "linear"), ((96, 48, 32), "mlp2x_gelu"), ((96, 48, 24, 32), "mlp3x_gelu")):
        config = ProjectorConfig(widths)
        assert config.kind == kind
        assert projector_config(SyntheticSource(config, "tiny", 0)) == config


def test_identity_projector(checkpoint, tmp_path):
    """Named by the configuration, since there are no weights to tell; slide tokens are the embeddings then."""
    folder, hidden = tmp_path / "identity", checkpoint.preset.llm.hidden
    checkpoint.write_base(folder)
    sources = Sources(llava=str(folder))
    refused(sources, tmp_path / "bundle", "no model.mm_projector.weight")
    checkpoint.write_base(folder, mm_projector_type="identity")
    manifest = build(sources, tmp_path / "bundle", components=("projector",))
    assert manifest.components["projector"].config["widths"] == [hidden]
    with Bundle.open(tmp_path / "bundle", 1).engine("projector") as engine:
        x = np.random.default_rng(0).normal(size=(7, hidden)).astype(np.float32)
        assert np.array_equal(engine.run({"tokens": x})["embeds"], x)


def test_vicuna_config():
    """SPEC 5's language model."""
    config = llama_config(
        {
            "model_type": "llama",
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "intermediate_size": 11008,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
        "vicuna",
    )
    assert config == LlamaConfig(4096, 32, 32, 32, 128, 11008, 32000, 4096)


def test_get_of_an_unknown_tensor_names_it(checkpoint):
    source = open_weights(checkpoint.slide)
    with pytest.raises(CheckpointError, match="no tensor named nope"):
        source.get("nope")
    with pytest.raises(CheckpointError, match="no tensor named nope"):
        resolve(all_of(checkpoint)).parts["llm"].source.get("nope")


# A checkpoint over a base


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", None], ids=["damaged", "whole"])
def test_a_base_never_fills_up_a_merged_checkpoint(checkpoint, tmp_path, lost):
    checkpoint.write_base(checkpoint.root / "llava_base", model_type="llama")
    if lost:
        del checkpoint.tensors["llm"][lost]
    checkpoint.write_llava()
    base = str(checkpoint.root / "llava_base")
    words = [
        f"{checkpoint.llava}: holds {20 if lost else 21} tensors of a language model itself",
        f"over the base {base}",
    ]
    refused(all_of(checkpoint), tmp_path / "bundle", *words, f"--llava {checkpoint.llava}")
    refused(Sources(llava=str(checkpoint.llava), llava_base=base), tmp_path / "bundle", *words)


@pytest.fixture
def over_base(checkpoint, tmp_path):
    """over_base(own, base): the projector's folder with that config.json (None: without), over a LLaVA of these."""

    def make(own: dict[str, Any] | None, base: dict[str, Any]) -> Sources:
        checkpoint.write_base(tmp_path / "base", checkpoint.tensors["projector"], **base)
        folder = tmp_path / "projector"
        checkpoint.save(folder / "mm_projector.safetensors", checkpoint.tensors["projector"])
        if own is not None:
            checkpoint.write_json(folder / "config.json", own)
        return Sources(llava=str(folder), llava_base=str(tmp_path / "base"))

    return make


def test_the_projectors_own_settings_come_first(checkpoint, over_base):
    def config(own: dict[str, Any] | None, base: dict[str, Any]) -> LlamaConfig:
        return resolve(over_base(own, base)).parts["llm"].config

    whole, llm = checkpoint.llama_json(), checkpoint.preset.llm
    assert config(None, {"max_position_embeddings": 64}).context == 64
    assert config({**whole, "max_position_embeddings": 128}, {"max_position_embeddings": 64}).context == 128
    assert config({"mm_projector_type": "mlp2x_gelu"}, {}) == llm
    assert config({"mm_projector_type": "mlp2x_gelu"}, {"rope_theta": 5e5}).rope_theta == 5e5
    later = {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    assert config({"rope_scaling": None}, later).rope_theta == 5e5
    assert config(later, {"rope_theta": 5e5}).rope_theta == 5e5
    assert config({**whole, "mm_hidden_size": 1024, "torch_dtype": "bfloat16"}, {"mm_hidden_size": 512}) == llm


@pytest.mark.parametrize(
    ("own", "base", "told"),
    [
        ({"rope_theta": 1e4}, {"rope_theta": 5e5}, "rope_theta = 10000.0 there and 500000.0 in the base's"),
        ({"rope_parameters": {"rope_theta": 1e4}}, {"rope_theta": 5e5}, "rope_theta = 10000.0 there and 500000.0"),
        ({"rms_norm_eps": 1e-6}, {}, "rms_norm_eps = 1e-06 there and 1e-05"),
        ({"num_attention_heads": 2}, {}, "num_attention_heads = 2 there and 4"),
        ({"num_key_value_heads": 4}, {}, "num_key_value_heads = 4 there and 2"),
        ({"hidden_size": 128}, {}, "hidden_size = 128 there and 64"),
        ({"intermediate_size": 128}, {}, "intermediate_size = 128 there and 96"),
        ({"mm_projector_type": "identity"}, {}, "mm_projector_type = 'identity' there and 'mlp2x_gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {}, "rope_type = 'linear' there and 'default'"),
        ({"hidden_act": "gelu"}, {}, "hidden_act = 'gelu' there and 'silu'"),
    ],
    ids=str,
)
def test_settings_that_contradict_the_bases(over_base, tmp_path, own, base, told):
    sources = over_base(own, base)
    refused(
        sources, tmp_path / "bundle", f"{sources.llava}: config.json disagrees with {sources.llava_base}/config", told
    )


def test_a_base_of_another_architecture(over_base, tmp_path):
    sources = over_base({"model_type": "llava_llama"}, {"model_type": "qwen2"})
    refused(sources, tmp_path / "bundle", f"{sources.llava_base}: config.json", "'qwen2' is not supported")


def test_half_a_projector_is_not_filled_up_from_the_base(checkpoint, over_base, tmp_path):
    sources = over_base(None, {})
    half = {n: x for n, x in checkpoint.tensors["projector"].items() if not n.endswith("2.bias")}
    checkpoint.save(tmp_path / "projector" / "mm_projector.safetensors", half)
    refused(sources, tmp_path / "bundle", "1 missing (model.mm_projector.2.bias)")
    checkpoint.save(tmp_path / "projector" / "mm_projector.safetensors", {"other": np.ones(3, np.float32)})
    refused(sources, tmp_path / "bundle", "holds 1 tensors of a language model itself (other)")
    checkpoint.save(
        tmp_path / "projector" / "mm_projector.safetensors", {"model.vision_tower.x": np.ones(3, np.float32)}
    )
    refused(sources, tmp_path / "bundle", "no mm_projector tensors, expected projector weights over the base")


def test_two_names_of_one_tensor(checkpoint, tmp_path):
    name = "model.mm_projector.0.weight"
    checkpoint.tensors["projector"][name.removeprefix("model.")] = checkpoint.tensors["projector"][name]
    checkpoint.write_llava()
    refused(
        all_of(checkpoint), tmp_path / "bundle", name, "mm_projector.0.weight stand for the same tensor", "keep one"
    )
