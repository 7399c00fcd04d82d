"""The pieces of a synthetic Llama-style vocabulary; the same on every machine.

Byte-pair training in a few lines (ties go to the smaller pair) on corpus.py.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

from wsi_rt.export.tokenizer.corpus import CORPUS
from wsi_rt.runtime.errors import CheckpointError

_SPACE = "\u2581"
_WORDS = re.compile(rf"{_SPACE}?[A-Za-z]+|.", re.DOTALL)  # digits and punctuation stay single, as in Llama

SPECIALS = ("<unk>", "<s>", "</s>")
BYTE_PIECES = tuple(f"<0x{b:02X}>" for b in range(256))
# Code points that fill a vocabulary once the corpus has no more merges: CJK, Hangul, CJK A, CJK B.
_FILLER = ((0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x3400, 0x4DBF), (0x20000, 0x2A6DF))

Pair = tuple[str, str]


def synthetic_pieces(vocab_size: int) -> tuple[list[str], list[Pair]]:
    """(exactly `vocab_size` distinct pieces, merges in order).

    Order: <unk>, <s>, </s>, 256 byte pieces, merged pieces, the corpus's characters, filler characters.
    CheckpointError: a size that cannot be made.
    """
    fixed = [*SPECIALS, *BYTE_PIECES]
    alphabet, merges = train_bpe(CORPUS, max_merges=max(0, vocab_size))
    smallest = len(fixed) + len(alphabet)
    largest = smallest + len(merges) + sum(last - first + 1 for first, last in _FILLER)
    if not smallest <= vocab_size <= largest:
        raise CheckpointError(f"the synthetic vocabulary size is {vocab_size}, expected {smallest} to {largest}")
    merges = merges[: vocab_size - smallest]
    pieces = [*fixed, *(left + right for left, right in merges), *alphabet]
    fill = (chr(c) for first, last in _FILLER for c in range(first, last + 1))
    pieces += [next(fill) for _ in range(vocab_size - len(pieces))]
    return pieces, merges


def _merge(word: Sequence[str], pair: Pair) -> list[str]:
    out: list[str] = []
    i = 0
    while i < len(word):
        if tuple(word[i : i + 2]) == pair:
            out.append(pair[0] + pair[1])
            i += 2
        else:
            out.append(word[i])
            i += 1
    return out


def train_bpe(text: str, max_merges: int) -> tuple[list[str], list[Pair]]:
    """(alphabet, merges): the characters of `text`, sorted, and at most `max_merges` merges, in training order.

    Merges stay inside words of letters; a word carries the sentencepiece space before it. Two merges with the same
    result would make one piece: the second is left out. Training ends when every word is one piece.
    """
    counts = Counter(_WORDS.findall("".join(_SPACE + word for word in text.split())))
    words = [(list(word), n) for word, n in sorted(counts.items())]
    alphabet = sorted({c for word in counts for c in word})
    totals: Counter[Pair] = Counter()
    places: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, (word, n) in enumerate(words):
        for pair in pairwise(word):
            totals[pair] += n
            places[pair].add(index)
    merges: list[Pair] = []
    known = set(alphabet)
    while totals and len(merges) < max_merges:
        best = min(totals, key=lambda pair: (-totals[pair], pair))
        if best[0] + best[1] in known:  # the same piece, split elsewhere
            del totals[best]
            continue
        known.add(best[0] + best[1])
        merges.append(best)
        for index in places.pop(best):
            word, n = words[index]
            merged = _merge(word, best)
            for pair in pairwise(word):
                totals[pair] -= n
                if totals[pair] <= 0:
                    del totals[pair]
            for pair in pairwise(merged):
                totals[pair] += n
                places[pair].add(index)
            words[index] = (merged, n)
    return alphabet, merges
