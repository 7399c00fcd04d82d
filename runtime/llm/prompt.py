"""The prompt around the slide: what stands before the slide tokens and what stands after (SPEC 5).

The first part (system text and "USER: ") is the same for every question on a slide, so its key/value cache
can be computed once per slide; only the second part depends on the question.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from wsi_rt.runtime.errors import InputError

IMAGE_MARK = "<image>"

# Source: LLaVA's conversation templates (separator style "two"); vicuna_v1 is what training used.
SYSTEM: Mapping[str, str] = {
    "vicuna_v1": (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    ),
    "llava_v1": (
        "A chat between a curious human and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the human's questions."
    ),
}


class PromptEncoder(Protocol):
    """What encode_prompt needs of a tokenizer (llm.tokenizer.Tokenizer has it)."""

    @property
    def bos_id(self) -> int: ...

    def encode(self, text: str) -> list[int]: ...


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of one prompt: `before`, then the slide tokens, then `after`. `before` begins with BOS."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @property
    def text_tokens(self) -> int:
        """Tokens of both parts, the slide tokens not counted."""
        return len(self.before) + len(self.after)


def text_before(template: str) -> str:
    """The text up to the slide; the same for every question. InputError: a template we do not have."""
    if template not in SYSTEM:
        raise InputError(f"--template is {template!r}, expected {' or '.join(SYSTEM)}")
    return f"{SYSTEM[template]} USER: "


def text_after(question: str) -> str:
    """The text from the slide to the answer.

    InputError: as `checked`.
    """
    return f"\n{checked(question)} ASSISTANT:"


def text_next_turn(question: str) -> str:
    """The text after an assistant's turn, which ended with EOS, up to the next answer (separator style "two").

    InputError: as `checked`.
    """
    return f"USER: {checked(question)} ASSISTANT:"


def checked(question: str) -> str:
    """The question as it is.

    InputError: a question that is blank, holds `<image>` (a second slide position), or is not valid Unicode.
    """
    if not question.strip():
        raise InputError(f"the question is {question!r}, expected some text; ask a question about the slide")
    if IMAGE_MARK in question:
        raise InputError(
            f"the question contains {IMAGE_MARK}, expected text only (the slide is placed before it); "
            f"remove {IMAGE_MARK} from the question"
        )
    try:
        question.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise InputError(
            f"the question has an undecodable character at position {exc.start}, expected UTF-8 text; "
            "re-encode the question as UTF-8"
        ) from exc
    return question


def split_prompt(template: str, question: str) -> tuple[str, str]:
    """The prompt's text, cut at the slide: (before, after). The question is used as given, never stripped.

    InputError: an unknown template, or a question that text_after() refuses.
    """
    return text_before(template), text_after(question)


def encode_prompt(tokenizer: PromptEncoder, template: str, question: str) -> PromptTokens:
    """Token ids of both parts, tokenised separately, BOS once at the start (golden/prompt/cases.json).

    InputError: as split_prompt().
    """
    before, after = split_prompt(template, question)
    return PromptTokens(
        before=(tokenizer.bos_id, *tokenizer.encode(before)),
        after=tuple(tokenizer.encode(after)),
    )
