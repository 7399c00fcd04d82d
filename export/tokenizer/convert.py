"""A checkpoint's tokenizer -> the bundle's `tokenizer/` folder, and a synthetic one for synthetic weights.

Writes `tokenizer.json` (the format of the `tokenizers` library) and `tokenizer_config.json`, which
wsi_rt.runtime.llm.tokenizer reads. Ids are exactly sentencepiece's: dummy prefix on every text, byte fallback, and
special tokens never made from text. (LLaVA itself loads the slow sentencepiece tokenizer.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from wsi_rt.export.sources.files import read_json_object
from wsi_rt.export.tokenizer.corpus import CORPUS
from wsi_rt.export.tokenizer.synthetic_bpe import BYTE_PIECES, SPECIALS, synthetic_pieces
from wsi_rt.runtime.errors import CheckpointError, MachineError
from wsi_rt.runtime.llm.tokenizer import CONFIG_FILE, TOKENIZER_FILE

_SPACE = "\u2581"
_NORMAL, _UNKNOWN, _CONTROL, _BYTE, _BPE = 1, 2, 3, 6, 2  # sentencepiece_model.proto
_NO_EXTRAS: Mapping[str, Any] = {"truncation": None, "padding": None, "post_processor": None}

Merge = tuple[str, str]


def write_tokenizer(source: Path | str, out_dir: Path | str) -> dict[str, Any]:
    """Convert a checkpoint's tokenizer; returns what tokenizer_config.json holds.

    source: a directory (its tokenizer.model is preferred over its tokenizer.json, being what LLaVA loads), or one of
    these files. CheckpointError: a missing, corrupt or unsupported tokenizer. MachineError: no sentencepiece.
    """
    path = _find(Path(source))
    data, config = _from_sentencepiece(path) if path.suffix == ".model" else _from_json(path)
    config["source"] = {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    return _write(data, config, Path(out_dir))


def synthetic_tokenizer(out_dir: Path | str, vocab_size: int = 2048) -> dict[str, Any]:
    """Write a Llama-style tokenizer of exactly `vocab_size` tokens; the same bytes on every run and machine.

    Merges are trained on corpus.py. Returns what tokenizer_config.json holds. CheckpointError: a size that
    cannot be made.
    """
    pieces, merges = synthetic_pieces(vocab_size)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    config = _config(style="sentencepiece", bos=1, eos=[2], unk=0, special=[0, 1, 2], size=vocab_size, prefix=True)
    config["source"] = {"name": "synthetic", "sha256": hashlib.sha256(CORPUS.encode()).hexdigest()}
    return _write(_llama_json(vocab, merges, _added(vocab, SPECIALS), prefix=True), config, Path(out_dir))


def _find(source: Path) -> Path:
    if source.is_dir():
        for name in ("tokenizer.model", TOKENIZER_FILE):
            if (source / name).is_file():
                return source / name
        raise CheckpointError(
            f"{source} has no tokenizer, expected tokenizer.model or {TOKENIZER_FILE}; "
            "copy it from the base language model"
        )
    if not source.is_file():
        raise CheckpointError(f"{source} does not exist, expected a tokenizer file or a directory with one")
    if source.suffix not in (".model", ".json"):
        raise CheckpointError(f"{source} is not a tokenizer, expected a .model or .json file")
    return source


def _from_sentencepiece(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.model -> (tokenizer.json, config). Merges are built for normal pieces only, as sentencepiece does."""
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as exc:
        raise MachineError(
            f"{path} needs {exc.name}, expected the extra; pip install '.[export]' in a checkout of wsi-rt"
        ) from exc

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as exc:
        raise CheckpointError(f"{path} is corrupt ({exc}), expected a sentencepiece model; download it again") from exc
    _refuse_other_models(path, model)
    vocab = {p.piece: i for i, p in enumerate(model.pieces)}
    special = [i for i, p in enumerate(model.pieces) if p.type in (_UNKNOWN, _CONTROL)]
    trainer, prefix = model.trainer_spec, model.normalizer_spec.add_dummy_prefix
    for what, i in (("BOS", trainer.bos_id), ("EOS", trainer.eos_id), ("UNK", trainer.unk_id)):
        if i not in special:
            raise CheckpointError(f"{path} has {what} id {i}, expected one of its special tokens {special}")
    config = _config(
        style="sentencepiece",
        bos=trainer.bos_id,
        eos=sorted({trainer.eos_id, *_config_eos_ids(path.parent)}),
        unk=trainer.unk_id,
        special=special,
        size=len(vocab),
        prefix=prefix,
    )
    merges = _merges_of({p.piece: p.score for p in model.pieces if p.type == _NORMAL})
    added = _added(vocab, [model.pieces[i].piece for i in special])
    return _llama_json(vocab, merges, added, prefix, unk=model.pieces[trainer.unk_id].piece), config


def _refuse_other_models(path: Path, model: Any) -> None:
    """CheckpointError unless the model is what tokenizer.json can express exactly: Llama's kind of BPE."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    types = {p.type for p in model.pieces}
    for ok, given, expected in (
        (len(model.pieces) > 0, "no pieces", "a vocabulary"),
        (len({p.piece for p in model.pieces}) == len(model.pieces), "repeated pieces", "distinct ones"),
        (trainer.model_type == _BPE, f"model type {trainer.model_type}", "BPE (2)"),
        (trainer.byte_fallback, "no byte fallback", "byte fallback"),
        (types <= {_NORMAL, _UNKNOWN, _CONTROL, _BYTE}, f"piece types {sorted(types)}", "normal, special and byte"),
        (not normalizer.precompiled_charsmap, f"normaliser {normalizer.name!r}", "'identity'"),
        (not normalizer.remove_extra_whitespaces, "whitespace removal", "whitespace kept"),
        (normalizer.escape_whitespaces, "unescaped whitespace", "escaped whitespace"),
    ):
        if not ok:
            raise CheckpointError(f"{path} has {given}, expected {expected}; pass its {TOKENIZER_FILE} instead")


def _merges_of(scores: Mapping[str, float]) -> list[Merge]:
    """Every way to build a piece from two pieces, best score first (sentencepiece merges by the result's score)."""
    rank = {piece: i for i, piece in enumerate(scores)}
    merges = [
        (-score, rank[piece[:cut]], rank[piece[cut:]], (piece[:cut], piece[cut:]))
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return [merge for *_, merge in sorted(merges)]


def _from_json(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json -> (normalised tokenizer.json, config). No merge makes a special or byte token from text."""
    data, merges, added = _parse_json(path)
    model, vocab = data["model"], data["model"]["vocab"]
    ids = {**vocab, **{name: t["id"] for name, t in added.items()}}
    if model.get("type", "BPE") != "BPE" or sorted(ids.values()) != list(range(len(ids))):
        raise CheckpointError(
            f"{path} is a {model.get('type')} tokenizer of {len(ids)} tokens, expected BPE with ids 0, 1, 2, ..."
        )
    unk = model.get("unk_token")
    bos, eos = _special_ids(path, ids)
    special = {name for name, i in ids.items() if i in (bos, *eos) or name == unk}
    special |= {name for name, t in added.items() if t.get("special")}
    config = _config(
        style="sentencepiece" if model.get("byte_fallback") else "bytelevel",
        bos=bos,
        eos=eos,
        unk=ids.get(unk),
        special=sorted(ids[name] for name in special),
        size=len(ids),
        prefix=_has_prefix(data),
    )
    keep = [m for m in merges if m[0] + m[1] not in special and m[0] + m[1] not in BYTE_PIECES]
    tokens = [{**t, "special": name in special} for name, t in added.items()]
    if config["style"] == "sentencepiece":
        return _llama_json(vocab, keep, tokens, config["dummy_prefix"], unk=unk), config
    if "ByteLevel" not in json.dumps(data.get("decoder")):
        raise CheckpointError(f"{path} has neither byte fallback nor byte-level pieces, expected one of them")
    config["dummy_prefix"] = False
    return {**data, **_NO_EXTRAS, "added_tokens": tokens, "model": {**model, "merges": keep}}, config


def _parse_json(path: Path) -> tuple[dict[str, Any], list[Merge], dict[str, dict[str, Any]]]:
    """(the whole file, merges, added tokens by content). CheckpointError when it is not a BPE tokenizer.json."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        merges = [_pair(m) for m in data["model"]["merges"]]
        added = {str(t["content"]): dict(t, id=int(t["id"])) for t in data.get("added_tokens") or []}
        dict(data["model"]["vocab"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CheckpointError(
            f"{path} is corrupt ({type(exc).__name__}: {exc}), expected a BPE tokenizer.json; download it again"
        ) from exc
    return data, merges, added


def _pair(merge: object) -> Merge:
    """ "a b" or ["a", "b"] -> ("a", "b"). ValueError for anything else."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not (isinstance(parts, list) and len(parts) == 2 and all(isinstance(p, str) for p in parts)):
        raise ValueError(f"merge {merge!r}")
    return parts[0], parts[1]


def _has_prefix(data: Mapping[str, Any]) -> bool:
    """Whether the tokenizer puts a space before a text: normaliser Prepend or pre-tokenizer Metaspace."""
    parts = json.dumps([data.get("normalizer"), data.get("pre_tokenizer")])
    return '"Prepend"' in parts or '"prepend_scheme": "first"' in parts or '"prepend_scheme": "always"' in parts


def _special_ids(path: Path, ids: Mapping[str, int]) -> tuple[int, list[int]]:
    """(BOS id, EOS ids) from tokenizer_config.json, config.json and generation_config.json beside the file."""
    folder = path.parent
    settings = read_json_object(folder / CONFIG_FILE, optional=True)

    def named(key: str, default: str) -> int | None:
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        return ids.get(token if isinstance(token, str) else default)

    bos = named("bos_token", "<s>")
    if bos is None:
        given = read_json_object(folder / "config.json", optional=True).get("bos_token_id")
        bos = given if isinstance(given, int) else None
    last = named("eos_token", "</s>")
    eos = sorted({*([] if last is None else [last]), *_config_eos_ids(folder)})
    if bos is None or not eos:
        raise CheckpointError(
            f"{path} does not tell its BOS and EOS tokens, expected {CONFIG_FILE} or config.json beside it"
        )
    return bos, eos


def _config_eos_ids(folder: Path) -> Iterator[int]:
    for name in ("config.json", "generation_config.json"):
        given = read_json_object(folder / name, optional=True).get("eos_token_id")
        yield from (i for i in (given if isinstance(given, list) else [given]) if isinstance(i, int))


def _config(
    *, style: str, bos: int, eos: list[int], unk: int | None, special: list[int], size: int, prefix: bool
) -> dict[str, Any]:
    return {
        "style": style,
        "bos_id": bos,
        "eos_ids": eos,
        "unk_id": unk,
        "special_ids": special,
        "vocab_size": size,
        "dummy_prefix": prefix,
    }


def _added(vocab: Mapping[str, int], names: Iterable[str]) -> list[dict[str, Any]]:
    """Entries of `added_tokens` for special tokens."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return [{"id": vocab[name], "content": name, **flags} for name in names]


def _llama_json(
    vocab: Mapping[str, int],
    merges: Iterable[Merge],
    added: list[dict[str, Any]],
    prefix: bool,
    unk: str | None = "<unk>",
) -> dict[str, Any]:
    """A tokenizer.json that encodes as Llama's sentencepiece model does."""
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "version": "1.0",
        **_NO_EXTRAS,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": [*prepend, _replace(" ", _SPACE)]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [_replace(_SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": dict(vocab),
            "merges": [list(m) for m in merges],
        },
    }


def _replace(old: str, new: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": old}, "content": new}


def _write(data: Mapping[str, Any], config: dict[str, Any], out_dir: Path) -> dict[str, Any]:
    """Both files, with bytes that depend on their content only."""
    out_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    (out_dir / TOKENIZER_FILE).write_bytes(text.encode("utf-8"))
    (out_dir / CONFIG_FILE).write_bytes((json.dumps(config, indent=2) + "\n").encode("utf-8"))
    return config
