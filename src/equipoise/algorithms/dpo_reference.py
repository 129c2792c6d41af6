"""What the reference thinks of every pair: computed once, before the first update, and kept in the run directory.

`reference.safetensors` holds a tensor [N, 2] for each split, the summed log-probabilities of chosen and rejected, with
a digest of the tokens they belong to. A resumed run reads it: by then the policy is no longer the reference.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from equipoise.algorithms.batches import length_slices, own_part
from equipoise.algorithms.checkpoint import flush_to_disk
from equipoise.algorithms.run import Run
from equipoise.algorithms.sft import EncodedDemonstration, collate
from equipoise.config import DPOConfig
from equipoise.errors import CheckpointError, DataError, EquipoiseError
from equipoise.models.flops import FlopCounter
from equipoise.models.policy import Policy
from equipoise.models.policy_module import PolicyModule
from equipoise.rollout.passes import TOKENS_PER_PASS

FILE = "reference.safetensors"
PAIR_TOKENS = TOKENS_PER_PASS // 2  # of the longer response of each pair in a pass without micro_batch_size
_METADATA = "equipoise"  # one key: the order of several would differ from file to file


@dataclass(frozen=True)
class EncodedPair:
    """Token ids of one pair; both responses end with EOS unless they were cut."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    def __len__(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def sides(self) -> tuple[EncodedDemonstration, EncodedDemonstration]:
        """The prompt with the chosen, and with the rejected response."""
        return (
            EncodedDemonstration(self.prompt_ids, self.chosen_ids),
            EncodedDemonstration(self.prompt_ids, self.rejected_ids),
        )


def reference_logprobs(
    policy: Policy, splits: Mapping[str, Sequence[EncodedPair]], config: DPOConfig, counter: FlopCounter, run: Run
) -> dict[str, Tensor]:
    """Summed log-probabilities [N, 2] of (chosen, rejected) under the reference, for every split, on the CPU.

    The reference is `policy.reference` where the policy has one, else the policy as it stands, which before the first
    update is the same: a fresh adapter adds nothing, and one that training continues from is as it was loaded.
    Computed at temperature 1, without gradients, and written; a run that resumes from a checkpoint reads them instead.

    Raises DataError where the file belongs to other pairs, CheckpointError where it is missing or damaged or cannot be
    written, EquipoiseError for a log-probability that is not finite.
    """
    path = run.out / FILE
    digest = digest_of(splits)
    if run.restore() is not None:
        return _read(path, digest, splits)
    with run.failing_together():
        size = config.micro_batch_size
        found = {name: _own_logprobs(policy, pairs, size, counter, run) for name, pairs in splits.items()}
    # Every process has filled its own rows of zeros: the sum puts them together exactly.
    found = {name: _sum_over_processes(values_N2, run) for name, values_N2 in found.items()}
    _check_finite(found, policy)
    with run.failing_together():
        if run.is_main:
            _write(path, found, digest)
    return found


def digest_of(splits: Mapping[str, Sequence[EncodedPair]]) -> str:
    """SHA-256 over the token ids of every pair of every split, in order."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        digest.update(f"{name} {len(splits[name])}\n".encode())
        for pair in splits[name]:
            for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids):
                digest.update(len(ids).to_bytes(8, "little") + np.asarray(ids, dtype="<i8").tobytes())
    return digest.hexdigest()


def _own_logprobs(
    policy: Policy, pairs: Sequence[EncodedPair], pairs_at_once: int | None, counter: FlopCounter, run: Run
) -> Tensor:
    """This process's rows of [N, 2], zeros elsewhere. No collective operation: the number of passes differs."""
    dtype = torch.float64 if next(policy.module.parameters()).dtype == torch.float64 else torch.float32
    values_N2 = torch.zeros(len(pairs), 2, dtype=dtype)
    own = sorted(own_part(range(len(pairs)), run.rank, run.num_processes), key=lambda row: len(pairs[row]))
    with _reference(policy) as module:
        for part in length_slices([len(pairs[row]) for row in own], pairs_at_once, PAIR_TOKENS):
            if not own[part]:
                continue
            places = [(row, side) for row in own[part] for side in (0, 1)]  # side by side: they share their prompt
            rows = [pairs[row].sides[side] for row, side in places]
            ids, mask, completion_mask = collate(policy, rows)
            summed_B = module(ids, mask, completion_mask).logprobs_BT.sum(dim=1)
            first = ids.shape[1] - completion_mask.shape[1]
            counts = counter.counts(ids[:, :first], mask[:, :first], completion_mask)
            run.count(reference=counter.forward(*counts))
            for (row, side), value in zip(places, summed_B.to(values_N2), strict=True):
                values_N2[row, side] = value
    return values_N2


@contextmanager
def _reference(policy: Policy) -> Iterator[PolicyModule]:
    if policy.reference is None:
        with torch.no_grad():
            yield policy.module
    else:
        with policy.reference.active() as module, torch.no_grad():
            yield module


def _sum_over_processes(values_N2: Tensor, run: Run) -> Tensor:
    if run.num_processes == 1:
        return values_N2
    summed = run.accelerator.reduce(values_N2.to(run.accelerator.device), reduction="sum")
    return summed.to(values_N2)  # type: ignore[union-attr]


def _check_finite(found: Mapping[str, Tensor], policy: Policy) -> None:
    for name, values_N2 in found.items():
        wrong = (~values_N2.isfinite()).any(dim=1).nonzero()
        if len(wrong):
            raise EquipoiseError(
                f"{policy.name}: the reference's log-probability of {len(wrong)} {name} pairs is not finite, the first "
                f"of them pair {int(wrong[0])}; set policy.precision to float32, or check the model's weights"
            )


# -- the file --------------------------------------------------------------------------------------------------------


def _write(path: Path, found: Mapping[str, Tensor], digest: str) -> None:
    """Whole or not at all; a process that dies leaves a temporary name that the next one removes."""
    temporary = path.with_name(f".{path.name}.tmp")
    tensors = {name: values_N2.contiguous() for name, values_N2 in found.items()}
    metadata = {_METADATA: json.dumps({"pairs": digest, "values": _checksum(tensors)})}
    try:
        save_file(tensors, temporary, metadata=metadata)
        flush_to_disk(temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: could not write the reference's log-probabilities: {error}; free space and run again"
        ) from error


def _read(path: Path, digest: str, splits: Mapping[str, Sequence[EncodedPair]]) -> dict[str, Tensor]:
    mend = "restore the file, or start again in another --out"
    try:
        with safe_open(path, framework="pt") as file:
            recorded = json.loads(file.metadata()[_METADATA])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
        values, pairs = recorded["values"], recorded["pairs"]
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: the reference's log-probabilities are missing; {mend}") from error
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}); {mend}") from error
    if values != _checksum(tensors):
        raise CheckpointError(f"{path}: does not match its checksum; {mend}")
    if pairs != digest or {name: len(rows) for name, rows in splits.items()} != {k: len(t) for k, t in tensors.items()}:
        raise DataError(
            f"{path}: belongs to other pairs than those of the recipe's `data` now: the files or the tokenizer were "
            "changed since the run began; undo the change, or start a new run in another --out"
        )
    return tensors


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
