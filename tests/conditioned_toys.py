"""A tokenizer that knows digits, for policies that read weights, and a recipe of two objectives over a toy model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.run_toys import World
from tests.toy import CHAT_TEMPLATE, WORDS, toy_model

TEMPLATE = "make {weights}."
ASPECTS = {
    "politeness": {"higher_is_better": True, "range": [0, 1]},
    "rudeness": {"higher_is_better": False, "range": [0, 1]},
}
SCORERS = [{"function": "tests.toy:two_aspects", "aspects": ASPECTS}]


def reading_tokenizer(*, chat: bool = False, whole: bool = False) -> PreTrainedTokenizerFast:
    """Words of the toy world, names of aspects, and every digit and sign by itself.

    `whole`: a weight of 0, 1/2 or 1 is one token instead, its place in the message included, which a network that
    cannot count digits reads; others are unknown.
    """
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *WORDS, "politeness", "rudeness", "b", "system", "user", "assistant"]
    numbers = [f"{n}{end}" for n in ("0.00", "0.50", "1.00") for end in ",."] if whole else [*"0123456789.,<|>:"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, *numbers])}, unk_token="<unk>"))
    signs = [] if whole else [pre_tokenizers.Split(Regex("[a-z]+|."), "isolated")]
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), *signs])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class ReadingWorld(World):
    """The world of runs, with a model that can read weights."""

    def __init__(self, directory: Path, *, whole: bool = False, **sizes: Any) -> None:
        super().__init__(directory)
        self.model = directory / "reader"
        tokenizer = reading_tokenizer(whole=whole)
        toy_model(**{"layers": 1, "vocabulary": len(tokenizer), **sizes}).save_pretrained(self.model)
        tokenizer.save_pretrained(self.model)

    def conditioned(self, name: str = "conditioned", **changes: Any) -> Path:
        """A recipe of a policy that reads two weights."""
        values = {
            "scorers": SCORERS,
            "objective_weights": {"politeness": 2.0, "rudeness": 1.0},
            "conditioned": {"template": TEMPLATE},
            "checkpoint": {"every": 1},
        }
        return self.grpo(name, **values | changes)
