"""Prompt lookup: what followed when the last few tokens stood somewhere before is a guess at what follows now.

Source: prompt lookup decoding (Saxena 2023), REST (He et al. 2023) for the table of phrases.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

LONGEST, SHORTEST = 8, 2  # tokens that agree; single tokens match by chance too often
Source = Literal["own", "earlier", "phrase"]
SLIDES, ANSWERS = 64, 64  # remembered: so many slides, so many answers on each


@dataclass(frozen=True)
class Guess:
    """token_ids: what may come next; matched: how many tokens before them agree with `source`."""

    token_ids: tuple[int, ...]
    source: Source
    matched: int


class NgramText:
    """Token lists, and for every n-gram in them where it stood last with something behind it."""

    def __init__(self) -> None:
        self._lists: list[list[int]] = []
        self._after: dict[tuple[int, ...], tuple[int, int]] = {}  # n-gram -> (list, place behind it)

    def __len__(self) -> int:
        return len(self._lists)

    def add(self, tokens: Iterable[int]) -> None:
        self._lists.append([])
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """One more token of the list added last."""
        tokens, which = self._lists[-1], len(self._lists) - 1
        for n in range(SHORTEST, LONGEST + 1):
            if len(tokens) >= n:
                self._after[tuple(tokens[-n:])] = which, len(tokens)
        tokens.append(token)

    def following(self, ngram: tuple[int, ...], most: int) -> list[int]:
        """Up to `most` tokens that came after it, none when it is new."""
        which, place = self._after.get(ngram, (0, 0))
        return self._lists[which][place : place + most] if place else []


class OwnText:
    """A sequence's question and answer so far. Indexed when first looked into: most sequences may never be."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._pending = list(prompt_ids)
        self._text: NgramText | None = None
        self.start = tuple(prompt_ids[-SHORTEST:])  # "ASSISTANT:", by which the beginnings of answers are found
        self._last: list[int] = list(prompt_ids[-LONGEST:])

    def push(self, token: int) -> None:
        self._pending.append(token)
        self._last = [*self._last[1 - LONGEST :], token]

    def guess(self, others: Mapping[Source, NgramText], most: int) -> Guess | None:
        """Up to `most` tokens: the longest n-gram decides, then own text before `others`, in their order."""
        if self._text is None:
            self._text = NgramText()
            self._text.add(())
        for token in self._pending:
            self._text.push(token)
        self._pending = []
        texts: dict[Source, NgramText] = {"own": self._text, **others}
        for n in range(min(LONGEST, len(self._last)), SHORTEST - 1, -1):
            ngram = tuple(self._last[-n:])
            for source, text in texts.items():
                if found := text.following(ngram, most):
                    return Guess(tuple(found), source, n)
        return None


class AnswerMemory:
    """Answers already given, by slide."""

    def __init__(self) -> None:
        self._slides: OrderedDict[Hashable, NgramText] = OrderedDict()

    def add(self, slide: Hashable, tokens: Sequence[int]) -> None:
        text = self._slides.setdefault(slide, NgramText())
        self._slides.move_to_end(slide)
        if len(text) >= ANSWERS:  # start over: forgetting one answer would leave holes in the index
            text = self._slides[slide] = NgramText()
        text.add(tokens)
        while len(self._slides) > SLIDES:
            self._slides.popitem(last=False)

    def of(self, slide: Hashable) -> NgramText | None:
        return self._slides.get(slide)
