"""What a sampler returns: token ids as sampled, with everything the update needs to know about them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

FINISHED = "stop"
TRUNCATED = "length"


@dataclass(frozen=True)
class Rollout:
    """Completions of a batch of prompts. Suffixes: B completions, S prompt tokens, T completion tokens.

    Prompts are padded on the left, completions on the right, so column S is the first completion token of every
    row. Text is for people and scorers; training uses the ids as sampled and never encodes text again.
    """

    prompt_ids_BS: Tensor
    prompt_mask_BS: Tensor  # bool, True = a token of the prompt
    completion_ids_BT: Tensor
    completion_mask_BT: Tensor  # bool, True = sampled and trained on; the EOS is, padding is not
    sampler_logprobs_BT: Tensor  # float32, at the sampling temperature, 0 where masked
    group_ids_B: Tensor  # int64, the global index of the prompt in the step: groups never share an id
    index_in_group_B: Tensor  # int64, 0..G-1
    finish_reasons: tuple[str, ...]  # "stop": an EOS id was sampled; "length": cut at max_tokens
    prompts: tuple[Any, ...]  # as given, text or messages, one per row
    kinds: tuple[str, ...]
    completions: tuple[str, ...]  # decoded without special tokens
    temperature: float
    policy_version: int = 0
    prompts_truncated: int = 0  # prompts of the batch that were cut to fit

    def __len__(self) -> int:
        return self.completion_ids_BT.shape[0]

    def __getitem__(self, rows: Tensor | list[int] | slice) -> Rollout:
        """The rollout of these rows, in this order; columns are kept so that shapes do not depend on the rows."""
        if isinstance(rows, list):
            rows = torch.tensor(rows, dtype=torch.long)
        index = torch.arange(len(self))[rows.cpu() if isinstance(rows, Tensor) else rows]
        positions = index.tolist()
        changes: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = value[index.to(value.device)]
            elif isinstance(value, tuple):
                changes[field.name] = tuple(value[position] for position in positions)
        return replace(self, **changes)

    def trimmed(self) -> Rollout:
        """The same rows without columns that are padding in all of them; at least one column of each kind stays."""
        tokens = max(1, int(self.lengths_B.max())) if len(self) else 1
        prompt = max(1, int(self.prompt_mask_BS.sum(dim=1).max())) if len(self) else 1
        return replace(
            self,
            prompt_ids_BS=self.prompt_ids_BS[:, -prompt:],
            prompt_mask_BS=self.prompt_mask_BS[:, -prompt:],
            completion_ids_BT=self.completion_ids_BT[:, :tokens],
            completion_mask_BT=self.completion_mask_BT[:, :tokens],
            sampler_logprobs_BT=self.sampler_logprobs_BT[:, :tokens],
        )

    @property
    def lengths_B(self) -> Tensor:
        """Sampled tokens per completion, the EOS included."""
        return self.completion_mask_BT.sum(dim=1)

    @property
    def truncated_B(self) -> Tensor:
        """True where the completion was cut at max_tokens."""
        return torch.tensor([reason == TRUNCATED for reason in self.finish_reasons], dtype=torch.bool)
