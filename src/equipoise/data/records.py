"""What a row of data becomes once it has been checked: one frozen record kind for each use."""

from __future__ import annotations

from dataclasses import dataclass

Messages = list[dict[str, str]]
Prompt = str | Messages

KINDS = ("benign", "borderline", "adversarial", "unlabelled")
SPLITS = ("train", "validation", "test")
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class PromptRecord:
    """A prompt to answer. `row` is the line (or row) it stands on, `location` how messages name it.

    `preamble` is what a policy reads above the prompt and nobody else does: scorers and files know the prompt alone.
    """

    prompt: Prompt
    kind: str = "unlabelled"
    category: str | None = None
    source: str | None = None
    row: int = 0
    location: str = ""
    split: str | None = None
    preamble: str | None = None


@dataclass(frozen=True, slots=True)
class ScoredRecord:
    """A response with scores on their native scale, by aspect name. None, or no entry: not scored."""

    prompt: Prompt
    response: str
    scores: dict[str, float | None]
    split: str | None = None
    source: str | None = None
    row: int = 0
    location: str = ""


@dataclass(frozen=True, slots=True)
class PairRecord:
    """Two responses to a prompt, the first preferred.

    `chosen_truncated`, `rejected_truncated`: the response was cut at the longest length, so no EOS stands behind it.
    """

    prompt: Prompt
    chosen: str
    rejected: str
    kind: str = "unlabelled"
    source: str | None = None
    row: int = 0
    location: str = ""
    split: str | None = None
    chosen_truncated: bool = False
    rejected_truncated: bool = False


@dataclass(frozen=True, slots=True)
class DemonstrationRecord:
    """A prompt and the response to imitate."""

    prompt: Prompt
    response: str
    kind: str = "unlabelled"
    source: str | None = None
    row: int = 0
    location: str = ""
    split: str | None = None


Record = PromptRecord | ScoredRecord | PairRecord | DemonstrationRecord
