"""One row checked: every problem in it is noted, and a record comes back only where there is none."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from equipoise.data.columns import MAPPABLE
from equipoise.data.problems import Problems, shown, suggestion
from equipoise.data.reading import Location, Row
from equipoise.data.records import (
    KINDS,
    ROLES,
    SPLITS,
    DemonstrationRecord,
    PairRecord,
    Prompt,
    PromptRecord,
    ScoredRecord,
)

_LOOKS_LIKE_MESSAGES = re.compile(r'\s*\[\s*\{\s*["\'](role|content)["\']')
_SPLIT_ALIASES = {"val": "validation", "valid": "validation", "dev": "validation", "eval": "validation"}
_USUAL_NAMES = {
    "prompt": ("question", "instruction", "input", "query", "context", "messages", "text"),
    "response": ("answer", "output", "completion", "reply", "text", "generation"),
    "chosen": ("preferred", "accepted", "winner", "better"),
    "rejected": ("dispreferred", "loser", "worse"),
    "scores": ("labels", "ratings", "annotations", "score", "label", "rating"),
}


class _Checker:
    """Reads the fields of one row, noting every problem instead of stopping at the first."""

    def __init__(self, row: Row, problems: Problems) -> None:
        self.location: Location = row.location
        self.fields = row.fields
        self._problems = problems
        self._before = problems.count

    @property
    def good(self) -> bool:
        return self._problems.count == self._before

    def problem(self, message: str) -> None:
        self._problems.add(self.location, message)

    def required(self, name: str) -> Any:
        """The value, or None after noting that it is missing."""
        value = self.fields.get(name)
        if value is None:
            found = [str(key) for key in self.fields if self.fields[key] is not None]
            state = "is null" if name in self.fields else "is missing"
            close = suggestion(name, [key for key in found if key not in MAPPABLE]) or _usual_name(name, found)
            self.problem(f"field `{name}` {state}{close}; the row has: {', '.join(found) or 'nothing'}")
            self._problems.hint(f"If another column holds it, map it: `columns: {{{name}: <its name>}}`")
        return value

    def prompt(self) -> Prompt:
        value = self.required("prompt")
        if value is None:
            return ""
        if isinstance(value, str):
            return self._text("prompt", value)
        if not isinstance(value, list):
            self.problem(f"`prompt` must be a text or a list of messages, found {shown(value)}")
            return ""
        return self._messages(value)

    def _messages(self, value: list[Any], field: str = "prompt") -> list[dict[str, str]]:
        messages: list[dict[str, str]] = []
        for index, message in enumerate(value):
            name = f"{field}[{index}]"
            if not isinstance(message, dict) or not isinstance(message.get("content"), str):
                self.problem(f'`{name}` must be {{"role": ..., "content": text}}, found {shown(message)}')
            elif message.get("role") not in ROLES:
                role = message.get("role")
                self.problem(f"`{name}.role` is {role!r}{suggestion(role, ROLES)}; use {', '.join(ROLES)}")
            else:
                self._text(f"{name}.content", message["content"])
                # Columnar formats fill keys that other rows have with null.
                messages.append({key: part for key, part in message.items() if part is not None})
        if not value:
            self.problem("`prompt` is a list without messages; give at least one user message")
        elif messages and len(messages) == len(value) and messages[-1]["role"] == "assistant":
            self.problem("`prompt` ends with an assistant message, so there is nothing to answer; end with the user's")
        return messages

    def _text(self, name: str, value: str) -> str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            self.problem(f"`{name}` holds half of a surrogate pair at character {error.start + 1}; write valid Unicode")
        return value

    def response(self, name: str = "response") -> str:
        value = self.required(name)
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
            value = value[0].get("content") if value[0].get("role") == "assistant" else value
        if isinstance(value, str):
            return self._text(name, value)
        if value is not None:
            self.problem(f"`{name}` must be a text, found {shown(value)}")
        return ""

    def truncated(self, side: str) -> bool:
        """Whether a side of a pair was cut: `chosen_truncated`, `rejected_truncated`; absent means no."""
        value = self.fields.get(f"{side}_truncated")
        if value is None or isinstance(value, bool):
            return bool(value)
        self.problem(f"`{side}_truncated` must be true or false, found {shown(value)}")
        return False

    def pair(self) -> tuple[Prompt, str, str]:
        """Prompt, chosen and rejected of a preference pair, from any of the forms that `load_pairs` takes."""
        sides = {name: self.required(name) for name in ("chosen", "rejected")}
        if any(side is None for side in sides.values()):
            return "", "", ""
        replies = {name: self._side(name, value) for name, value in sides.items()}
        if not self.good:
            return "", "", ""
        before = {name: history for name, (history, _) in replies.items() if history is not None}
        prompt = self._prompt_of_pair(before, has_text_sides=len(before) < 2)
        chosen, rejected = (reply for _, reply in replies.values())
        if self.good:
            self._two_different_replies(chosen, rejected)
        return prompt, chosen, rejected

    def _two_different_replies(self, chosen: str, rejected: str) -> None:
        for name, reply in (("chosen", chosen), ("rejected", rejected)):
            if not reply.strip():
                self.problem(f"`{name}` is empty; a pair needs two responses, leave the row out")
        if chosen.strip() and chosen.strip() == rejected.strip():
            self.problem(
                f"`chosen` and `rejected` are the same, {shown(chosen)}: nothing is preferred; leave the row out"
            )

    def _side(self, name: str, value: Any) -> tuple[list[Any] | None, str]:
        """What stands before the last reply (None for a text or a lone reply), and the reply."""
        if isinstance(value, str):
            if _LOOKS_LIKE_MESSAGES.match(value):
                self.problem(
                    f"`{name}` is a text that holds messages, {shown(value)}; write them as a list, not as a string"
                )
            return None, self._text(name, value)
        if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
            self.problem(f"`{name}` must be a text or a list of messages, found {shown(value)}")
            return None, ""
        # Columnar formats fill keys that other rows have with null.
        *history, last = [{key: part for key, part in message.items() if part is not None} for message in value]
        if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
            self.problem(
                f"`{name}` must end with the reply to compare, a message of the assistant, found {shown(last)}"
            )
            return None, ""
        return history or None, self._text(f"{name}[{len(history)}].content", last["content"])

    def _prompt_of_pair(self, histories: dict[str, list[Any]], *, has_text_sides: bool) -> Prompt:
        """The prompt as given, or the part that two whole conversations share."""
        given = self.fields.get("prompt")
        if given is None and has_text_sides:
            self.problem(
                "field `prompt` is missing, and it can be taken from `chosen` and `rejected` only where both are whole "
                "conversations (lists of messages), not texts or lone replies; add `prompt`"
            )
            return ""
        if given is None:
            chosen, rejected = histories["chosen"], histories["rejected"]
            shared = next((i for i, pair in enumerate(zip(chosen, rejected, strict=False)) if pair[0] != pair[1]), None)
            if shared is not None or len(chosen) != len(rejected):
                at = min(len(chosen), len(rejected)) if shared is None else shared
                self.problem(
                    f"the conversations `chosen` ({len(chosen) + 1} messages) and `rejected` ({len(rejected) + 1}) "
                    f"differ from message {at} on; they must share everything before the last reply, their prompt"
                )
                return ""
            return self._messages(chosen, "chosen")
        prompt = self.prompt()
        for name, history in histories.items():
            if self.good and _as_messages(prompt) != history:
                self.problem(
                    f"what stands before the reply in `{name}` is not `prompt`: {shown(history)} against "
                    f"{shown(prompt)}; give the reply alone, or the same messages in both"
                )
        return prompt

    def optional_text(self, name: str) -> str | None:
        value = self.fields.get(name)
        if value is None or isinstance(value, str):
            return value
        self.problem(f"`{name}` must be a text or null, found {shown(value)}")
        return None

    def kind(self) -> str:
        value = self.fields.get("kind")
        if value is None:
            return "unlabelled"
        if value not in KINDS:
            self.problem(f"unknown kind {shown(value)}{suggestion(value, KINDS)}; use {', '.join(KINDS)}")
        return value

    def split(self) -> str | None:
        value = self.fields.get("split")
        if value is None or value in SPLITS:
            return value
        alias = _SPLIT_ALIASES.get(str(value).lower())
        hint = f" (did you mean {alias!r}?)" if alias else suggestion(value, SPLITS)
        self.problem(f"unknown split {shown(value)}{hint}; use {', '.join(SPLITS)}")
        return None

    def scores(self) -> dict[str, float | None]:
        value = self.required("scores")
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.problem(f"`scores` must map aspects to numbers, found {shown(value)}")
            return {}
        if not value:
            self.problem("`scores` is empty; name at least one aspect (null where it was not scored)")
        return {aspect: self._score(aspect, score) for aspect, score in value.items()}

    def _score(self, aspect: str, value: Any) -> float | None:
        if not str(aspect).strip():
            self.problem(f"`scores` has an aspect without a name (value {shown(value)})")
        if value is None:
            return None
        name = f"scores.{aspect}"
        if isinstance(value, bool) or not isinstance(value, int | float | Decimal):
            kind = {bool: "a boolean", str: "a string"}.get(type(value), f"a {type(value).__name__}")
            self.problem(f"`{name}` is {kind}, {shown(value)}; write a number, or null where it was not scored")
            return None
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.problem(f"`{name}` is {number}; write a finite number, or null where it was not scored")
        return number


def _as_messages(prompt: Prompt) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _usual_name(name: str, found: Sequence[str]) -> str:
    usual = [other for other in _USUAL_NAMES.get(name, ()) if other in found]
    return f" (did you mean {usual[0]!r}?)" if usual else ""


def prompt_record(row: Row, problems: Problems) -> PromptRecord | None:
    """The row as a prompt, or None with its problems noted."""
    check = _Checker(row, problems)
    record = PromptRecord(
        prompt=check.prompt(),
        kind=check.kind(),
        category=check.optional_text("category"),
        source=check.optional_text("source"),
        row=row.location.number,
        location=str(row.location),
        split=check.split(),
    )
    return record if check.good else None


def scored_record(row: Row, problems: Problems) -> ScoredRecord | None:
    """The row as a scored response, or None with its problems noted."""
    check = _Checker(row, problems)
    record = ScoredRecord(
        prompt=check.prompt(),
        response=check.response(),
        scores=check.scores(),
        split=check.split(),
        source=check.optional_text("source"),
        row=row.location.number,
        location=str(row.location),
    )
    return record if check.good else None


def pair_record(row: Row, problems: Problems) -> PairRecord | None:
    """The row as a preference pair, or None with its problems noted."""
    check = _Checker(row, problems)
    prompt, chosen, rejected = check.pair()
    record = PairRecord(
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        kind=check.kind(),
        source=check.optional_text("source"),
        row=row.location.number,
        location=str(row.location),
        split=check.split(),
        chosen_truncated=check.truncated("chosen"),
        rejected_truncated=check.truncated("rejected"),
    )
    return record if check.good else None


def demonstration_record(row: Row, problems: Problems) -> DemonstrationRecord | None:
    """The row as a demonstration, or None with its problems noted."""
    check = _Checker(row, problems)
    record = DemonstrationRecord(
        prompt=check.prompt(),
        response=check.response(),
        kind=check.kind(),
        source=check.optional_text("source"),
        row=row.location.number,
        location=str(row.location),
        split=check.split(),
    )
    return record if check.good else None
