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


def reading_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """Words of the toy world, names of aspects, and every digit and sign by itself."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", *WORDS, "politeness", "rudeness", "b", "system", "user", "assistant"]
    backend = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*words, *"0123456789.,<|>:"])}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex("[a-z]+|."), "isolated")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


class ReadingWorld(World):
    """The world of runs, with a model that can read weights."""

    def __init__(self, directory: Path, *, chat: bool = False, layers: int = 1) -> None:
        super().__init__(directory)
        self.model = directory / "reader"
        tokenizer = reading_tokenizer(chat=chat)
        toy_model(layers=layers, vocabulary=len(tokenizer)).save_pretrained(self.model)
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
