"""Strings that end a completion, wherever tokens cut them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class StopStrings:
    """Ends rows whose text has come to hold one of some strings.

    Only a row's last tokens are decoded: a token holds a byte or more of the text, special tokens hold none, so a
    string of n bytes lies within the last n other tokens. One more stands before them, since some tokenizers drop the
    space that a text starts with.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self._tokenizer, self._strings = tokenizer, tuple(strings)
        self._special = frozenset(tokenizer.all_special_ids)
        self._window = 1 + max((len(string.encode()) for string in strings), default=0)

    def ended(self, ids_BT: Tensor, lengths_B: Tensor, rows_N: Tensor) -> Tensor:
        """Which of the rows `rows_N` end in text that holds a string, [N]; each is asked after every token."""
        if not self._strings:
            return torch.zeros(len(rows_N), dtype=torch.bool, device=ids_BT.device)
        lengths = lengths_B[rows_N].tolist()
        rows = ids_BT[rows_N].cpu()
        tails = [self._tail(row[:length].tolist()) for row, length in zip(rows, lengths, strict=True)]
        texts = [self._tokenizer.decode(tail, skip_special_tokens=True) for tail in tails]
        found = [any(string in text for string in self._strings) for text in texts]
        return torch.tensor(found, dtype=torch.bool, device=ids_BT.device)

    def _tail(self, ids: list[int]) -> list[int]:
        tail: list[int] = []
        for token in reversed(ids):
            if token not in self._special:
                tail.append(token)
                if len(tail) == self._window:
                    break
        return tail[::-1]

    def cut(self, text: str) -> str:
        """The text before the first of the strings.

        Example: "yes.\\nUser: no" with "\\nUser:" and "no" is "yes.".
        """
        return text[: min((at for string in self._strings if (at := text.find(string)) >= 0), default=len(text))]
