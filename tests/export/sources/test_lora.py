"""LoRA adapters (SPEC 6 b): merged as peft merges them, or refused by what does not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("transformers", reason="the export extra is not installed")
save_file = pytest.importorskip("safetensors.torch", reason="the export extra is not installed").save_file
load_file = pytest.importorskip("safetensors.torch").load_file

from wsi_rt.export.sources.adapter import read_adapter_config  # noqa: E402
from wsi_rt.export.sources.checkpoint import Sources, resolve  # noqa: E402
from wsi_rt.export.sources.files import open_weights  # noqa: E402
from wsi_rt.export.sources.lora import LoraSource  # noqa: E402
from wsi_rt.runtime.errors import CheckpointError  # noqa: E402

RANK, WIDTH = 4, 24
MODULE = "model.layers.0.self_attn.q_proj"


def llama(**changes: Any) -> Any:
    """A small transformers Llama, its weights drawn from one seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes})).float().eval()


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 7},
    "patterns": {
        "rank_pattern": {"q_proj": 3, r"model\.layers\.1\.mlp\.up_proj": 6},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 5, "down_proj": 1},
    },
    "rslora-patterns": {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "fan-in-fan-out": {"fan_in_fan_out": True},
    "embedding": {"target_modules": [*LINEAR, "embed_tokens", "lm_head"]},
    "modules-to-save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
    "bias-all": {"bias": "all"},
    "bias-lora-only": {"bias": "lora_only"},
    "regex": {"target_modules": r".*\.1\..*_proj"},
    "some-layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "one-kind": {"target_modules": ["v_proj"]},
    "gaussian": {"init_lora_weights": "gaussian"},
}


def adapted(folder: Path, setting: str, safe: bool = True) -> tuple[Path, Path, dict[str, Any]]:
    """(adapter folder, base folder, merged tensors) by peft itself, every trained tensor away from its start."""
    peft = pytest.importorskip("peft", reason="peft is not installed (the dev extra)")
    model = llama(**({"attention_bias": True} if "bias" in setting else {}))
    model.save_pretrained(folder / "base")
    config = peft.LoraConfig(**{"r": RANK, "lora_alpha": 16, "target_modules": LINEAR, **SETTINGS[setting]})
    wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.empty_like(parameter).uniform_(-0.5, 0.5, generator=generator))
    wrapped.save_pretrained(folder / "adapter", safe_serialization=safe)
    merged = wrapped.merge_and_unload()
    return folder / "adapter", folder / "base", merged.state_dict()


def merge(adapter: Path, base: Path, name: str = "adapter_model.safetensors") -> LoraSource:
    return LoraSource(open_weights(adapter / name), open_weights(base), read_adapter_config(adapter))


@pytest.mark.filterwarnings("ignore")  # peft's own: embeddings saved too, fan_in_fan_out switched off
@pytest.mark.parametrize("setting", SETTINGS)
def test_equals_peft_bit_by_bit(tmp_path, setting):
    adapter, base, expected = adapted(tmp_path, setting)
    source, before = merge(adapter, base), open_weights(base)
    assert set(source.shapes()) == set(expected)
    changed = 0
    for name, wanted in expected.items():
        x = source.get(name)
        assert np.array_equal(x, wanted.numpy()), name
        changed += not np.array_equal(x, before.get(name))
    assert changed > 0


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_of_torch_save(tmp_path):
    """adapter_model.bin; peft writes safetensors now, older ones are about."""
    adapter, base, expected = adapted(tmp_path, "plain")
    torch.save(load_file(adapter / "adapter_model.safetensors"), adapter / "adapter_model.bin")
    source = merge(adapter, base, "adapter_model.bin")
    assert all(np.array_equal(source.get(n), x.numpy()) for n, x in expected.items())


# A hand-made adapter, to be spoilt


def factors(rank: int = RANK, module: str = MODULE) -> dict[str, Any]:
    torch.manual_seed(2)
    prefix = f"base_model.model.{module}"
    return {f"{prefix}.lora_A.weight": torch.randn(rank, WIDTH), f"{prefix}.lora_B.weight": torch.randn(WIDTH, rank)}


@pytest.fixture
def base(tmp_path) -> Path:
    torch.manual_seed(3)
    names = [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)] + ["lm_head.weight"]
    path = tmp_path / "base" / "model.safetensors"
    path.parent.mkdir()
    save_file({n: torch.randn(WIDTH, WIDTH) for n in names}, str(path))
    return path.parent


@pytest.fixture
def over(base: Path, tmp_path: Path) -> Callable[..., LoraSource]:
    """over(tensors, **settings): that adapter over `base`."""

    def make(tensors: dict[str, Any], **settings: Any) -> LoraSource:
        folder = tmp_path / "adapter"
        folder.mkdir(exist_ok=True)
        save_file(tensors, str(folder / "adapter_model.safetensors"))
        given = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": r".*\.0\..*q_proj", **settings}
        (folder / "adapter_config.json").write_text(json.dumps(given))
        return merge(folder, base)

    return make


@pytest.mark.parametrize(
    "rename",
    [
        lambda n: n,
        lambda n: n.replace(".weight", ".default.weight"),
        lambda n: n.removeprefix("base_model.model."),
        lambda n: f"base_model.model.{n}",
        lambda n: n.replace("base_model.model.", "base_model.model.model."),
        lambda n: n.replace("base_model.", ""),
    ],
    ids=["published", "default", "bare", "doubled", "doubled-model", "model"],
)
def test_every_form_of_the_keys(over, base, rename):
    source = over({rename(n): x for n, x in factors().items()})
    a, b = factors().values()
    name = f"{MODULE}.weight"
    w = load_file(base / "model.safetensors")
    assert np.array_equal(source.get(name), (w[name] + (b @ a) * 2.0).numpy())
    assert np.array_equal(source.get("lm_head.weight"), w["lm_head.weight"].numpy())


def test_the_digest_tells_every_input(over, base):
    digests = {
        over(factors()).digest(),
        over(factors(), lora_alpha=9).digest(),
        over(factors(), use_rslora=True).digest(),
    }
    digests.add(over({n: 2 * x for n, x in factors().items()}).digest())
    w = load_file(base / "model.safetensors")
    save_file({n: 2 * x for n, x in w.items()}, str(base / "model.safetensors"))
    digests.add(over(factors()).digest())
    assert len(digests) == 5
    assert over(factors()).digest() in digests


A, B = factors()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(A), [f"{B} has no lora_A beside it"]),
        (lambda t: t.pop(B), [f"{A} has no lora_B beside it"]),
        (lambda t: t.update(factors(module="model.layers.7.self_attn.q_proj")), ["2 of 4 tensors change nothing of"]),
        (
            lambda t: t.update({f"{MODULE}.lora_magnitude_vector": torch.ones(3)}),
            ["1 of 3 tensors", "magnitude_vector"],
        ),
        (lambda t: t.update({"base_model.model.nope.weight": torch.ones(3)}), ["base_model.model.nope.weight"]),
        (lambda t: t.update({A: torch.ones(3, WIDTH)}), [MODULE, "lora_A [3, 24]", "expected [4, 24] and [24, 4]"]),
        (lambda t: t.update({B: torch.ones(WIDTH + 1, RANK)}), ["lora_B [25, 4]", "expected [4, 24] and [24, 4]"]),
        (lambda t: t.update(factors(rank=3)), ["lora_A [3, 24] and lora_B [24, 3], expected [4, 24]", "rank 4 of"]),
        (
            lambda t: t.update({n.replace(".weight", ".default.weight"): x.clone() for n, x in t.items()}),
            ["stand for the same tensor"],
        ),
    ],
    ids=["no-A", "no-B", "other-layer", "dora", "stranger", "A-rank", "B-size", "rank", "twice"],
)
def test_adapters_that_do_not_fit(over, change, words):
    tensors = factors()
    change(tensors)
    with pytest.raises(CheckpointError) as e:
        over(tensors)
    message = str(e.value)
    assert [w for w in ("adapter_model.safetensors", *words) if w not in message] == [], message
    assert "\n" not in message


def test_half_an_adapter_is_refused(over):
    """An adapter cut short would merge without a word otherwise: names of modules promise every layer's."""
    with pytest.raises(
        CheckpointError, match=r"1 modules that .* names have no tensors \(model.layers.1.self_attn.q_pr"
    ):
        over(factors(), target_modules=["q_proj"])
    both = factors() | factors(module=MODULE.replace("0", "1"))
    assert over(both, target_modules=["q_proj"])
    with pytest.raises(CheckpointError, match=r"names have no tensors \(lm_head\)"):
        over(factors(), modules_to_save=["lm_head"])
    assert over(factors(), target_modules=["q_proj"], layers_to_transform=[0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"use_qalora": True}, "use_qalora = True"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"of_some_later_release": 0.5}, "of_some_later_release = 0.5 is not supported"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3', expected LORA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights = 'loftq'"),
        ({"target_modules": "("}, "target_modules has '('"),
        ({"exclude_modules": [1]}, "exclude_modules = [1], expected a list of module names"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform = ['1'], expected a whole number"),
        ({"bias": "some"}, "bias = 'some', expected none, all or lora_only"),
        ({"r": 0}, "r = 0, expected a whole number"),
        ({"r": None}, "lacks r"),
        ({"lora_alpha": "16"}, "lora_alpha = '16', expected a number above 0"),
        ({"use_rslora": "yes"}, "use_rslora = 'yes', expected true or false"),
        ({"rank_pattern": [1]}, "rank_pattern = [1], expected an object"),
        ({"rank_pattern": {"q_proj": 2.5}}, "expected whole numbers"),
        ({"rank_pattern": {"q_proj": 0}}, "expected numbers above 0"),
        ({"alpha_pattern": {"(": 2}}, "expected a regular expression"),
        ({"modules_to_save": "lm_head"}, "modules_to_save = 'lm_head', expected a list"),
    ],
    ids=str,
)
def test_settings_that_change_the_arithmetic_are_refused_by_name(over, settings, words):
    with pytest.raises(CheckpointError) as e:
        over(factors(), **settings)
    assert words in str(e.value)
    assert "adapter_config.json" in str(e.value)


def test_settings_without_effect_are_accepted(over):
    inert = {"qalora_group_size": 16, "megatron_core": "megatron.core", "lora_dropout": 0.1, "inference_mode": True}
    inert |= {"unsloth_fixed": True, "layer_replication": None}
    assert over(factors(), **inert, use_dora=False, loftq_config={}, auto_mapping=None)


def test_a_change_of_tied_embeddings_is_refused(over, base):
    w = load_file(base / "model.safetensors")
    w["model.embed_tokens.weight"] = w.pop("lm_head.weight")
    save_file(w, str(base / "model.safetensors"))
    prefix = "base_model.model.model.embed_tokens.lora_embedding"
    with pytest.raises(CheckpointError, match=r"ties to its output layer"):
        over({f"{prefix}_A": torch.ones(RANK, WIDTH), f"{prefix}_B": torch.ones(WIDTH, RANK)})


def test_a_merge_that_overflows_is_named(over):
    tensors = factors()
    tensors[A] *= 1e30
    tensors[B] *= 1e30
    with pytest.raises(CheckpointError, match=rf"values of {MODULE}.weight are not finite"):
        over(tensors).get(f"{MODULE}.weight")


# Folders


@pytest.fixture
def lora_folder(tmp_path: Path, tiny_preset: str) -> Path:
    from wsi_rt.export.layouts import plan_layout, write_layout

    write_layout(plan_layout("tiny", 5, "lora", tmp_path / "ck"))
    return tmp_path / "ck"


def test_the_base_that_the_adapter_names(lora_folder, monkeypatch, tmp_path):
    llava, base = lora_folder / "llava", lora_folder / "llava_base"
    x = resolve(Sources(llava=str(llava), llava_base=str(base))).parts["llm"].source.digest()
    assert resolve(Sources(llava=str(llava))).parts["llm"].source.digest() == x
    monkeypatch.chdir(lora_folder)
    settings = json.loads((llava / "adapter_config.json").read_text())
    for name in (str(base), "llava_base"):
        (llava / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": name}))
        assert resolve(Sources(llava=str(llava))).parts["llm"].source.digest() == x
    for name in ("someone/vicuna-7b", None):
        (llava / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": name}))
        with pytest.raises(CheckpointError, match=rf"a LoRA adapter over {name!r}, .* --llava-base"):
            resolve(Sources(llava=str(llava)))


def test_the_tokenizer_of_the_adapter_comes_first(lora_folder):
    llava, base = lora_folder / "llava", lora_folder / "llava_base"
    assert resolve(Sources(checkpoint=str(lora_folder))).tokenizer == base
    (llava / "tokenizer.json").write_bytes((base / "tokenizer.json").read_bytes())
    assert resolve(Sources(checkpoint=str(lora_folder))).tokenizer == llava
    (llava / "tokenizer.json").unlink()
    (llava / "tokenizer.model").write_bytes(b"sentencepiece")
    assert resolve(Sources(checkpoint=str(lora_folder))).tokenizer == llava
    assert resolve(Sources(checkpoint=str(lora_folder), tokenizer="mine")).tokenizer == Path("mine")


def test_without_the_trained_projector_the_base_must_have_one(lora_folder):
    (lora_folder / "llava" / "non_lora_trainables.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no model.mm_projector.weight"):
        resolve(Sources(checkpoint=str(lora_folder)))


def test_the_trained_projector_wins_over_the_bases(lora_folder):
    shards = sorted((lora_folder / "llava_base").glob("*.safetensors"))
    index = lora_folder / "llava_base" / "model.safetensors.index.json"
    placed = json.loads(index.read_text())
    tensors = load_file(shards[0]) | {"model.mm_projector.0.weight": torch.zeros(48, 96)}
    save_file(tensors, str(shards[0]))
    placed["weight_map"]["model.mm_projector.0.weight"] = shards[0].name
    index.write_text(json.dumps(placed))
    assert (
        resolve(Sources(checkpoint=str(lora_folder))).parts["projector"].source.get("model.mm_projector.0.weight").any()
    )


def test_an_adapter_over_an_adapter_and_one_without_weights(lora_folder):
    llava = str(lora_folder / "llava")
    with pytest.raises(CheckpointError, match=r"is a LoRA adapter itself, expected a whole language model"):
        resolve(Sources(llava=llava, llava_base=llava))
    (lora_folder / "llava" / "adapter_model.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"no adapter_model.safetensors or adapter_model.bin beside adapter_config"
    ):
        resolve(Sources(llava=llava))


def test_the_adapters_config_is_the_models(lora_folder):
    path = lora_folder / "llava" / "config.json"
    settings = json.loads(path.read_text())

    def config(**changes: Any) -> Any:
        path.write_text(json.dumps(settings | changes))
        return resolve(Sources(checkpoint=str(lora_folder))).parts["llm"].config

    assert config(max_position_embeddings=128).context == 128  # the base's is 256; training may change it
    with pytest.raises(
        CheckpointError, match=r"llava_base/config.json: rms_norm_eps = 0.25 there and 1e-05 in the bas"
    ):
        config(rms_norm_eps=0.25)
    path.unlink()  # peft alone saves none: the base's
    parts = resolve(Sources(checkpoint=str(lora_folder))).parts
    assert (parts["llm"].config.context, parts["llm"].config.rms_eps) == (256, 1e-5)


def test_an_adapter_names_no_other_way_out_than_merging(over):
    for settings in ({"init_lora_weights": "pissa"}, {"peft_type": "IA3"}):
        with pytest.raises(CheckpointError, match=r"expected [^;]+; merge it with peft first$"):
            over(factors(), **settings)


def layers(*indices: int, module: str = "self_attn.q_proj") -> dict[str, Any]:
    return {n: x for i in indices for n, x in factors(module=f"model.layers.{i}.{module}").items()}


CHOSEN = {"target_modules": ["q_proj"], "layers_pattern": "layers"}


@pytest.mark.parametrize(
    ("settings", "held", "missing"),
    [
        ({"target_modules": "all-linear"}, [0], "model.layers.1.self_attn.q_proj"),
        ({"target_modules": "all-linear"}, [0, 1], None),
        ({"target_modules": r".*\.q_proj"}, [1], "model.layers.0.self_attn.q_proj"),
        ({"target_modules": r".*\.q_proj"}, [0, 1], None),
        ({"target_modules": r".*\.1\..*"}, [1], None),
        ({"target_modules": r"language_model\..*"}, [0], "model.layers.1.self_attn.q_proj"),
        ({"target_modules": None}, [1], "model.layers.0.self_attn.q_proj"),
        ({**CHOSEN, "layers_to_transform": [0, 1]}, [0], "model.layers.1.self_attn.q_proj"),
        ({**CHOSEN, "layers_to_transform": 1}, [1], None),
        ({**CHOSEN, "layers_to_transform": [1], "layers_pattern": ["(h|layers)"]}, [1], None),
        ({**CHOSEN, "layers_to_transform": [0], "layers_pattern": None}, [1], "model.layers.0.self_attn.q_proj"),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.0\..*"}, [1], None),
        ({"target_modules": ["q_proj"], "exclude_modules": ["lm_head"]}, [1], "model.layers.0.self_attn.q_proj"),
    ],
    ids=str,
)
def test_half_an_adapter_is_refused_however_its_targets_are_told(over, settings, held, missing):
    if missing is None:
        assert over(layers(*held), **settings)
        return
    with pytest.raises(CheckpointError, match=rf"1 modules that .* have no tensors \({missing}\); download"):
        over(layers(*held), **settings)


def test_a_saved_module_is_saved_whole(over, base):
    """modules_to_save that name norms of every layer, of which one is cut off."""
    w = load_file(base / "model.safetensors")
    norms = {f"model.layers.{i}.input_layernorm.weight": torch.ones(WIDTH) for i in range(2)}
    save_file(w | norms, str(base / "model.safetensors"))
    held = {f"base_model.model.{n}": 2 * x for n, x in norms.items()}
    assert over(factors() | held, modules_to_save=["input_layernorm"]).get(list(norms)[1])[0] == 2
    held.pop("base_model.model.model.layers.1.input_layernorm.weight")
    with pytest.raises(CheckpointError, match=r"no tensors \(model.layers.1.input_layernorm.weight\)"):
        over(factors() | held, modules_to_save=["input_layernorm"])


@pytest.fixture
def saved_projector(lora_folder) -> Path:
    """The projector within the adapter (peft's modules_to_save), over a plain language model."""
    llava = lora_folder / "llava"
    trained = torch.load(llava / "non_lora_trainables.bin", weights_only=True)
    (llava / "non_lora_trainables.bin").unlink()
    path = llava / "adapter_model.safetensors"
    save_file(load_file(path) | {n: x.contiguous() for n, x in trained.items()}, str(path))
    settings = json.loads((llava / "adapter_config.json").read_text())
    (llava / "adapter_config.json").write_text(json.dumps(settings | {"modules_to_save": ["mm_projector"]}))
    return lora_folder


def test_a_projector_saved_within_the_adapter(saved_projector, tmp_path):
    from wsi_rt.export.layouts import plan_layout, write_layout

    write_layout(plan_layout("tiny", 5, "merged", tmp_path / "merged"))
    expected = resolve(Sources(checkpoint=str(tmp_path / "merged"))).parts["projector"].source
    checkpoint = resolve(Sources(checkpoint=str(saved_projector)))
    source = checkpoint.parts["projector"].source
    assert all(np.array_equal(source.get(n), expected.get(n)) for n in expected.shapes())
    assert "projector of the base" not in checkpoint.label


def test_a_saved_projector_that_the_adapter_lacks(saved_projector):
    path = saved_projector / "llava" / "adapter_model.safetensors"
    save_file({n: x for n, x in load_file(path).items() if "mm_projector" not in n}, str(path))
    with pytest.raises(CheckpointError, match=r"names have no tensors \(mm_projector\)"):
        resolve(Sources(checkpoint=str(saved_projector)))


def give_projector(base: Path, scale: float = 1.0) -> None:
    """A plain base made a LLaVA: a projector of its own in its first shard."""
    shard, index = sorted(base.glob("*.safetensors"))[0], base / "model.safetensors.index.json"
    shapes = {"0.weight": (48, 96), "0.bias": (48,), "2.weight": (64, 48), "2.bias": (64,)}
    own = {f"model.mm_projector.{n}": torch.full(s, scale) for n, s in shapes.items()}
    save_file(load_file(shard) | own, str(shard))
    placed = json.loads(index.read_text())
    placed["weight_map"] |= dict.fromkeys(own, shard.name)
    index.write_text(json.dumps(placed))


def test_a_projector_of_the_base_is_told(lora_folder):
    give_projector(lora_folder / "llava_base", scale=0.5)
    told = "(projector of the base)"
    sources = Sources(checkpoint=str(lora_folder))
    assert told not in resolve(sources).label
    (lora_folder / "llava" / "non_lora_trainables.bin").unlink()
    checkpoint = resolve(sources)
    assert checkpoint.label.endswith(f"adapter_model.safetensors over {lora_folder / 'llava_base'} {told}")
    assert checkpoint.parts["projector"].source.get("model.mm_projector.0.bias")[0] == 0.5


def test_half_a_trained_projector_is_not_filled_up(lora_folder):
    give_projector(lora_folder / "llava_base")
    path = lora_folder / "llava" / "non_lora_trainables.bin"
    trained = torch.load(path, weights_only=True)
    torch.save({n: x for n, x in trained.items() if not n.endswith("2.bias")}, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(model.mm_projector.2.bias\)"):
        resolve(Sources(checkpoint=str(lora_folder)))


def test_two_names_of_one_trained_tensor(lora_folder):
    path = lora_folder / "llava" / "non_lora_trainables.bin"
    trained = torch.load(path, weights_only=True)
    name = next(iter(trained))
    torch.save(trained | {name.removeprefix("base_model."): trained[name]}, path)
    with pytest.raises(CheckpointError, match=rf"{name} and {name[11:]} stand for the same tensor, model.mm_projector"):
        resolve(Sources(checkpoint=str(lora_folder)))


def test_the_base_found_is_part_of_what_was_asked(lora_folder, monkeypatch, tmp_path):
    """A rebuild from elsewhere needs the folder that the adapter's own word led to from here."""
    llava, base = lora_folder / "llava", lora_folder / "llava_base"
    settings = json.loads((llava / "adapter_config.json").read_text())
    (llava / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "llava_base"}))
    monkeypatch.chdir(lora_folder)
    first = resolve(Sources(llava="llava"))
    assert first.sources == Sources(llava="llava", llava_base=str(base.resolve()))
    digest = first.digest
    monkeypatch.chdir(tmp_path)
    again = resolve(Sources(llava=str(llava), llava_base=first.sources.llava_base))
    assert again.digest == digest
    given = Sources(checkpoint=str(lora_folder))
    assert resolve(given).sources == given, "a folder holds its own base"


def test_a_base_of_an_absurd_name(lora_folder):
    path = lora_folder / "llava" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "x" * 5000}))
    with pytest.raises(CheckpointError, match=r"which is no folder here; name the base's folder with --llava-base"):
        resolve(Sources(llava=str(path.parent)))
