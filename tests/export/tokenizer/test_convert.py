"""Converted tokenizers give sentencepiece's ids and text; the synthetic one is the same on every run."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest

from wsi_rt.export.tokenizer import synthetic_tokenizer, write_tokenizer
from wsi_rt.export.tokenizer.corpus import CORPUS
from wsi_rt.export.tokenizer.synthetic_bpe import synthetic_pieces, train_bpe
from wsi_rt.runtime.errors import CheckpointError
from wsi_rt.runtime.llm.tokenizer import Tokenizer

SHARED = Path(__file__).resolve().parents[3].parent / "shared"
MODEL = SHARED / "data/llm/llama2_tokenizer.model"
STRINGS = (
    "",
    " ",
    "   ",
    "a",
    " a",
    "a  b   c",
    "trailing ",
    "\n",
    "\n\nUSER: \t x",
    "\r\n",
    "</s>",
    "<s>",
    "<unk>",
    "<0x0A>",
    "a</s>b <s> c",
    "▁ ▁▁x",
    "細胞の異型性は？",
    "naïve café — “quoted” … ≥ 20 %",
    "😀👩‍🔬 e\u0301 \u200b\ufeff",
    "\x00\x01\x7f",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "=================--------",
    "1234567890 pT2bN0 (AJCC 8th)",
    "\U0001f9ec \ufffd",
)
ALPHABET = (*"a=es/<>0é細😀▁ \n", "ab", "aa", "==", "the", "</s>", "  ")


@pytest.fixture(scope="module")
def sp():
    """The oracle: sentencepiece itself on the Llama-2 model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    if not MODEL.is_file():
        pytest.skip(f"{MODEL} is not here")
    return sentencepiece.SentencePieceProcessor(model_file=str(MODEL))


@pytest.fixture(scope="module")
def from_model(sp, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("model")
    write_tokenizer(MODEL, folder)
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def hf_folder(sp, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder with a tokenizer.json as published: transformers' own file for the same model.

    Its merges are put in score order, as transformers 4 wrote them and Llama-2 and Vicuna publish them; transformers 5
    orders them by id, which moves the merge of two spaces to the front and is not sentencepiece any more.
    """
    transformers = pytest.importorskip("transformers")
    base = pytest.importorskip("transformers.tokenization_utils_base")
    source = tmp_path_factory.mktemp("slow")
    shutil.copy(MODEL, source / "tokenizer.model")
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer", "legacy": true}')
    folder = tmp_path_factory.mktemp("hf")
    transformers.LlamaTokenizerFast.from_pretrained(source).save_pretrained(folder)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    scores = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(32000)]
    merges = base.generate_merges(data["model"]["vocab"], scores)
    data["model"]["merges"] = [" ".join(m) for m in merges]  # the older way to write them
    path.write_text(json.dumps(data), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def from_json(hf_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("json")
    write_tokenizer(hf_folder, folder)
    return Tokenizer(folder)


def random_texts(count: int) -> list[str]:
    rng = random.Random(0)
    return ["".join(rng.choice(ALPHABET) for _ in range(rng.randint(1, 30))) for _ in range(count)]


def bench_texts() -> list[str]:
    files = sorted((SHARED / "data/wsi_bench").glob("*.json"))
    if not files:
        pytest.skip("shared/data/wsi_bench is not here")
    rows = [row for f in files for row in json.loads(f.read_text(encoding="utf-8"))]
    return [turn["value"] for row in rows for turn in row["conversations"]]


@pytest.mark.parametrize("kind", ["from_model", "from_json"])
def test_ids_and_text_equal_sentencepiece(kind: str, sp, request: pytest.FixtureRequest) -> None:
    ours: Tokenizer = request.getfixturevalue(kind)
    for text in (*STRINGS, *random_texts(4000)):
        ids = sp.encode(text)
        assert ours.encode(text) == ids, repr(text)
        assert ours.decode(ids) == sp.decode(ids), repr(text)


@pytest.mark.parametrize("kind", ["from_model", "from_json"])
def test_wsi_bench_equals_sentencepiece(kind: str, sp, request: pytest.FixtureRequest) -> None:
    ours: Tokenizer = request.getfixturevalue(kind)
    texts = bench_texts()
    assert len(texts) > 1000
    for text in texts:
        ids = sp.encode(text)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == sp.decode(ids)


def test_any_ids_decode_as_sentencepiece_does(from_model: Tokenizer, sp) -> None:
    """Malformed bytes and specials included; <unk> left out (sentencepiece prints a mark for it, we drop it)."""
    rng = random.Random(1)
    malformed = 0
    for _ in range(5000):
        pick = (rng.randrange(3, 259), rng.randrange(1, 32000), rng.randrange(29000, 32000), 29871)
        ids = [rng.choice(pick) for _ in range(rng.randint(0, 12))]
        assert from_model.decode(ids) == sp.decode(ids), ids
        malformed += "\ufffd" in sp.decode(ids)
    assert malformed > 500


def test_config_of_the_llama_tokenizer(from_model: Tokenizer, from_json: Tokenizer) -> None:
    for tokenizer in (from_model, from_json):
        assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, (2,), 32000)
    config = json.loads((from_model.folder / "tokenizer_config.json").read_text())
    assert config["unk_id"] == 0
    assert config["source"]["sha256"] == hashlib.sha256(MODEL.read_bytes()).hexdigest()


def test_readme_example(from_model: Tokenizer) -> None:
    text = "A chat between a curious user and an artificial intelligence assistant."
    assert from_model.encode(text) == [319, 13563, 1546, 263, 12758, 1404, 322, 385, 23116, 21082, 20255, 29889]


def test_a_directory_prefers_the_sentencepiece_model(hf_folder: Path, sp, tmp_path: Path) -> None:
    source = tmp_path / "both"
    shutil.copytree(hf_folder, source)
    shutil.copy(MODEL, source / "tokenizer.model")
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 13]}')
    config = write_tokenizer(source, tmp_path / "out")
    assert config["source"]["name"] == "tokenizer.model"
    assert config["eos_ids"] == [2, 13]


def bytelevel_folder(folder: Path) -> Path:
    """A small GPT-2 style tokenizer.json, trained here by the tokenizers library."""
    import tokenizers as tk

    hf = tk.Tokenizer(tk.models.BPE())
    hf.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    hf.decoder = tk.decoders.ByteLevel()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf.train_from_iterator([CORPUS], trainer)
    folder.mkdir()
    hf.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        '{"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}'
    )
    (folder / "config.json").write_text('{"eos_token_id": 0}')
    return folder


def test_bytelevel_tokenizer(tmp_path: Path) -> None:
    import tokenizers as tk

    source = bytelevel_folder(tmp_path / "src")
    config = write_tokenizer(source, tmp_path / "out")
    assert (config["style"], config["bos_id"], config["eos_ids"]) == ("bytelevel", 1, [0, 2])
    ours, hf = Tokenizer(tmp_path / "out"), tk.Tokenizer.from_file(str(source / "tokenizer.json"))
    for text in (s for s in (*STRINGS, *random_texts(300)) if "<|" not in s):
        assert ours.encode(text) == hf.encode(text).ids
        assert ours.decode(ours.encode(text)) == text
    ids = ours.encode("a<|im_end|>b")
    assert not {0, 1, 2} & set(ids)
    assert ours.decode([1, *ids, 2]) == "a<|im_end|>b"


def test_merges_never_make_a_special_or_byte_token(tmp_path: Path) -> None:
    """A tokenizer.json whose merges could build </s> or <0x0A> from text: sentencepiece would not."""
    synthetic_tokenizer(tmp_path / "src")
    path = tmp_path / "src/tokenizer.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    vocab = data["model"]["vocab"]
    chain = ["</", "</s", "<0", "<0x", "<0x0", "<0x0A"]
    for piece in chain:
        vocab[piece] = len(vocab)
    steps = [(p[:-1], p[-1]) for p in (*chain, "</s>", "<0x0A>")]
    data["model"]["merges"] = [list(s) for s in steps] + data["model"]["merges"]
    path.write_text(json.dumps(data), encoding="utf-8")
    (tmp_path / "src/tokenizer_config.json").unlink()
    config = write_tokenizer(path, tmp_path / "out")
    assert (config["bos_id"], config["eos_ids"]) == (1, [2])  # found by name
    ours = Tokenizer(tmp_path / "out")
    ids = ours.encode("</s><0x0A>")
    assert vocab["</s"] in ids  # the merges are used
    assert not {2, vocab["<0x0A>"]} & set(ids)
    assert ours.decode(ids) == "</s><0x0A>"


def test_synthetic_round_trip(tmp_path: Path) -> None:
    synthetic_tokenizer(tmp_path)
    ours = Tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_ids, ours.vocab_size) == (1, (2,), 2048)
    for text in (*STRINGS, *random_texts(500)):
        ids = ours.encode(text)
        assert ours.decode(ids) == text.replace("▁", " ")
        assert not {0, 1, 2} & set(ids)
    assert len(ours.encode("The tumor is poorly differentiated.")) <= 7


def test_synthetic_bytes_are_pinned(tmp_path: Path) -> None:
    """Every synthetic checkpoint's answers depend on these bytes."""
    for name in ("one", "two"):
        synthetic_tokenizer(tmp_path / name)
    digests = {hashlib.sha256((tmp_path / n / "tokenizer.json").read_bytes()).hexdigest() for n in ("one", "two")}
    assert digests == {"216ed33ee47445632e8fe917a5001e968f91a20b57d09ad52d8cc78b0ba9fa6d"}


@pytest.mark.parametrize("size", [400, 2048, 2500, 32000])
def test_synthetic_size_is_exact(size: int, tmp_path: Path) -> None:
    pieces, merges = synthetic_pieces(size)
    assert len(pieces) == len(set(pieces)) == size
    assert all(a in pieces and b in pieces and a + b in pieces for a, b in merges[:200])
    synthetic_tokenizer(tmp_path, size)
    assert Tokenizer(tmp_path).vocab_size == size


def test_default_size_needs_no_filler() -> None:
    assert all(ord(c) < 128 or c == "▁" for piece in synthetic_pieces(2048)[0] for c in piece)


@pytest.mark.parametrize("size", [-1, 0, 300, 10**6])
def test_synthetic_size_that_cannot_be_made(size: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="expected 354 to"):
        synthetic_tokenizer(tmp_path, size)


def test_training_merges_the_most_frequent_pair_first() -> None:
    alphabet, merges = train_bpe("abab abab cd", max_merges=3)
    assert alphabet == ["a", "b", "c", "d", "▁"]
    assert merges == [("a", "b"), ("ab", "ab"), ("▁", "abab")]


def test_missing_and_corrupt_sources(tmp_path: Path, sp) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "bad.model").write_bytes(b"\x0a\xff\xff\xff\xff\xff not a model")
    (tmp_path / "none.model").write_bytes(b"")
    (tmp_path / "cut.model").write_bytes(MODEL.read_bytes()[:100_001])
    (tmp_path / "bad.json").write_text('{"model": {"type": "BPE"')
    (tmp_path / "wrong.json").write_text('{"model": {"type": "WordPiece", "vocab": {"a": 0}}}')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "x.txt").write_text("x")
    names = ["empty", "absent", "bad.model", "none.model", "cut.model", "bad.json", "wrong.json", "list.json", "x.txt"]
    for name in names:
        with pytest.raises(CheckpointError, match="expected") as caught:
            write_tokenizer(tmp_path / name, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_sentencepiece_models_we_cannot_express_are_refused(tmp_path: Path, sp) -> None:
    pb = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    changes = {
        "model type 1": lambda m: setattr(m.trainer_spec, "model_type", 1),
        "no byte fallback": lambda m: setattr(m.trainer_spec, "byte_fallback", False),
        "whitespace removal": lambda m: setattr(m.normalizer_spec, "remove_extra_whitespaces", True),
        "piece types": lambda m: setattr(m.pieces[500], "type", 4),
        "BOS id -1": lambda m: setattr(m.trainer_spec, "bos_id", -1),
    }
    for words, change in changes.items():
        model = pb.ModelProto()
        model.ParseFromString(MODEL.read_bytes())
        change(model)
        (tmp_path / "changed.model").write_bytes(model.SerializeToString())
        with pytest.raises(CheckpointError, match=words):
            write_tokenizer(tmp_path / "changed.model", tmp_path / "out")
