"""Questions and answers of both WSI-Bench releases (SPEC 7), matched by id.

Ids hold slide names, and questions are not for logs: messages name a record by its place in the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from wsi_rt.runtime.errors import InputError
from wsi_rt.runtime.features.torch_file import read_bounded
from wsi_rt.runtime.llm.prompt import IMAGE_MARK

MAX_RECORDS_BYTES = 1 << 30


@dataclass(frozen=True)
class Question:
    """One question. image: the slide it is about, "" when not told; place: "line 3" or "record 3"."""

    id: str
    text: str
    image: str
    place: str


@dataclass(frozen=True)
class ReferenceAnswer:
    """What the published script answered."""

    id: str
    text: str
    place: str


@dataclass(frozen=True)
class Matched:
    """Pairs in the order of the questions, and what found no partner, by place."""

    pairs: tuple[tuple[Question, ReferenceAnswer], ...]
    unanswered: tuple[str, ...]
    unasked: tuple[str, ...]
    repeated_questions: tuple[str, ...]
    repeated_answers: tuple[str, ...]
    other_slides: int = 0

    def left_out(self) -> dict[str, Any]:
        """For `--json`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items() if k != "pairs"}

    def notes(self) -> tuple[str, ...]:
        """What was left out, counted and named by place."""
        kinds = (
            (self.unanswered, "questions have no answer"),
            (self.unasked, "answers have no question"),
            (self.repeated_questions, "questions repeat an id (the first is used)"),
            (self.repeated_answers, "answers repeat an id (the first is used)"),
        )
        told = tuple(f"{len(places)} {what}: {_listed(places)}" for places, what in kinds if places)
        return (*told, f"{self.other_slides} questions are about other slides") if self.other_slides else told


def _listed(places: Sequence[str]) -> str:
    more = f" and {len(places) - 5} more" if len(places) > 5 else ""
    return ", ".join(places[:5]) + more


def read_questions(path: Path) -> tuple[Question, ...]:
    """A JSON list of the first release, or JSON lines of the later one. Raises InputError naming line or record."""
    return tuple(_question(row, path, place) for place, row in _rows(path))


def read_answers(path: Path) -> tuple[ReferenceAnswer, ...]:
    """JSON lines of either release: the answer is `text`, or `answer`. Raises InputError naming line or record."""
    return tuple(
        ReferenceAnswer(_id(row, path, place), _text(row, ("answer", "text"), path, place), place)
        for place, row in _rows(path)
    )


def match(questions: Sequence[Question], answers: Sequence[ReferenceAnswer]) -> Matched:
    """Pairs of equal ids; of a repeated id the first counts. Raises InputError when nothing matches."""
    first: dict[str, ReferenceAnswer] = {}
    repeated_answers = []
    for answer in answers:
        if answer.id in first:
            repeated_answers.append(answer.place)
        first.setdefault(answer.id, answer)
    pairs, unanswered, repeated, seen = [], [], [], set()
    for question in questions:
        if question.id in seen:
            repeated.append(question.place)
        elif question.id in first:
            pairs.append((question, first[question.id]))
        else:
            unanswered.append(question.place)
        seen.add(question.id)
    if not pairs:
        raise InputError(
            f"none of {len(answers)} answers has the question_id of one of {len(questions)} questions; "
            "expected --questions and --answers of one run"
        )
    unasked = tuple(a.place for a in first.values() if a.id not in seen)
    return Matched(tuple(pairs), tuple(unanswered), unasked, tuple(repeated), tuple(repeated_answers))


def about(matched: Matched, features: Path) -> Matched:
    """The pairs about the slide whose tokens `features` holds: those whose `image` has its file name.

    Where all pairs are about one slide, its name does not matter. Raises InputError when it does and none has it.
    """
    names = {PurePosixPath(q.image).stem for q, _ in matched.pairs}
    if len(names) <= 1:
        return matched
    own = tuple(p for p in matched.pairs if PurePosixPath(p[0].image).stem == features.stem)
    if not own:
        raise InputError(
            f"the questions are about {len(names)} slides, none of them named as --features {features}; "
            "expected a file named as in `image`, or questions about one slide"
        )
    return replace(matched, pairs=own, other_slides=len(matched.pairs) - len(own))


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of a JSON list or of JSON lines; blank lines are skipped."""
    try:
        text = read_bounded(path, MAX_RECORDS_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: byte {e.start} is not UTF-8, expected JSON in UTF-8: re-encode it") from e
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as e:
            where = f"line {e.lineno}" if isinstance(e, json.JSONDecodeError) else "the file"
            raise InputError(f"{path}: {where} is not JSON, expected one list of objects; write it again") from e
        for number, row in enumerate(rows, 1):
            yield _object(row, path, f"record {number}")
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise InputError(
                    f"{path}: line {number} is not JSON, expected one object a line; mend or remove that line"
                ) from e
            yield _object(row, path, f"line {number}")


def _object(row: Any, path: Path, place: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, dict):
        raise InputError(f"{path}: {place} is a {type(row).__name__}, expected an object with a question_id")
    return place, row


def _id(row: dict[str, Any], path: Path, place: str) -> str:
    found = row.get("question_id", row.get("id"))
    if isinstance(found, bool) or not isinstance(found, (str, int)):
        raise InputError(f"{path}: {place} has no question_id, expected a text or a number (or `id`)")
    return str(found)


def _text(row: dict[str, Any], keys: Sequence[str], path: Path, place: str) -> str:
    found = next((row[k] for k in keys if k in row), None)
    if not isinstance(found, str):
        raise InputError(f"{path}: {place} has no {' or '.join(keys)}, expected a text")
    return found


def _question(row: dict[str, Any], path: Path, place: str) -> Question:
    image = row.get("image")
    if "conversations" in row:
        turns = row["conversations"] if isinstance(row["conversations"], list) else []
        human = [t.get("value") for t in turns if isinstance(t, dict) and t.get("from") == "human"]
        if not human or not isinstance(human[0], str):
            raise InputError(f"{path}: {place} has no turn of a human, expected conversations of from and value")
        text = human[0]
    else:
        text = _text(row, ("question",), path, place)
    if IMAGE_MARK in text:  # where the slide goes is the template's business: LLaVA moves it to the front as well
        text = text.replace(IMAGE_MARK, "", 1).strip()
    return Question(_id(row, path, place), text, image if isinstance(image, str) else "", place)
