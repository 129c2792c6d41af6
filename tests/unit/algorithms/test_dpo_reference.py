"""The file of reference log-probabilities: what is in it, when it is read, when it is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.toy import plain_model, toy_policy_directory

from equipoise.algorithms import dpo, dpo_reference
from equipoise.algorithms.dpo import encode_pairs, train_dpo
from equipoise.algorithms.dpo_reference import FILE, EncodedPair, digest_of
from equipoise.algorithms.run import Run
from equipoise.config import DPOConfig
from equipoise.data import PairRecord
from equipoise.errors import CheckpointError, DataError, EquipoiseError
from equipoise.models.policy import load_policy

RECORDS = [PairRecord(f"how do i {w}", "please go " * (1 + i), f"no {w}") for i, w in enumerate(["go", "run", "walk"])]


class Crash(Exception):
    """The process is gone."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("policy") / "model"
    return toy_policy_directory(path, initializer_range=0.2, layers=1, hidden=16)


def config_of(directory: Path, **changes: Any) -> DPOConfig:
    values = {"policy": {"model": str(directory)}, "data": "unused", "batch_size": 1, "validation_fraction": 0}
    return DPOConfig.model_validate(values | {"checkpoint": {"every": 1}} | changes)


def train(
    directory: Path, out: Path, records: list[PairRecord] = RECORDS, *, resume: bool = False, **changes: Any
) -> None:
    config = config_of(directory, **changes)
    train_dpo(load_policy(directory, trainable=True), records, config, Run(out, config, resume=resume))


@pytest.fixture
def stopped(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that died after its second step, its first saved."""
    log = Run.log

    def dies(run: Run, at: int, values: dict[str, Any]) -> dict[str, Any]:
        if at == 2:
            raise Crash
        return log(run, at, values)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", dies)
        with pytest.raises(Crash):
            train(directory, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_the_file_holds_the_policy_s_log_probabilities(
    directory: Path, tmp_path: Path, micro_batch_size: int | None
) -> None:
    train(directory, tmp_path / "run", micro_batch_size=micro_batch_size)
    policy = load_policy(directory)
    found = load_file(tmp_path / "run" / FILE)
    assert found.keys() == {"train", "validation"} and found["validation"].shape == (0, 2)
    for pair, values in zip(encode_pairs(policy, RECORDS, 100)[0], found["train"], strict=True):
        for ids, value in zip((pair.chosen_ids, pair.rejected_ids), values, strict=True):
            with torch.no_grad():
                logits = plain_model(policy)(input_ids=torch.tensor([pair.prompt_ids + ids])).logits[0]
            table = torch.log_softmax(logits, dim=-1)[len(pair.prompt_ids) - 1 : -1]
            assert float(table.gather(1, torch.tensor(ids)[:, None]).sum()) == pytest.approx(float(value), abs=1e-5)


def test_it_is_computed_once_and_read_on_resume(
    directory: Path, stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any) -> Any:
        raise AssertionError("computed again")

    before = (stopped / FILE).stat().st_mtime_ns
    train(directory, tmp_path / "whole")
    monkeypatch.setattr(dpo_reference, "_own_logprobs", never)
    train(directory, stopped, resume=True)
    assert (stopped / FILE).stat().st_mtime_ns == before
    ours, theirs = (json.loads((out / "cost.json").read_text())["flops"] for out in (stopped, tmp_path / "whole"))
    assert ours == theirs and ours["reference"] > 0


@pytest.mark.parametrize(
    "records",
    [
        [*RECORDS[:2], PairRecord("how do i walk", "please", "no walk")],
        RECORDS[:2],
        [*RECORDS[1:], RECORDS[0]],
        [PairRecord(r.prompt, r.rejected, r.chosen) for r in RECORDS],
    ],
    ids=["other", "fewer", "reordered", "swapped"],
)
def test_other_pairs_are_refused(directory: Path, stopped: Path, records: list[PairRecord]) -> None:
    before = (stopped / "metrics.jsonl").read_bytes()
    with pytest.raises(DataError, match=f"{FILE}: belongs to other pairs than those of the recipe's `data` now"):
        train(directory, stopped, records, resume=True)
    assert (stopped / "metrics.jsonl").read_bytes() == before
    train(directory, stopped, resume=True)


def test_a_damaged_file_is_refused(directory: Path, stopped: Path) -> None:
    good = (stopped / FILE).read_bytes()
    flipped = bytearray(good)
    flipped[-3] ^= 0x40
    other = {name: tensor + 1 for name, tensor in load_file(stopped / FILE).items()}
    for content, message in (
        (bytes(flipped), "does not match its checksum"),
        (good[:-8], "cannot be read"),
        (b"", "cannot be read"),
        (None, "are missing"),
    ):
        (stopped / FILE).unlink()
        if content is not None:
            (stopped / FILE).write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{FILE}: .*{message}.*start again in another --out"):
            train(directory, stopped, resume=True)
        (stopped / FILE).write_bytes(good)
    save_file(other, stopped / FILE)
    with pytest.raises(CheckpointError, match="cannot be read"):
        train(directory, stopped, resume=True)


def test_a_run_that_dies_while_writing_it_starts_again(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def dies(source: Any, target: Any) -> None:
        if Path(target).name == FILE:
            raise Crash
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dies)
        with pytest.raises(Crash):
            train(directory, tmp_path / "run")
    assert (tmp_path / "run" / f".{FILE}.tmp").exists() and not (tmp_path / "run" / FILE).exists()
    train(directory, tmp_path / "run")
    train(directory, tmp_path / "whole")
    assert not (tmp_path / "run" / f".{FILE}.tmp").exists()
    assert (tmp_path / "run" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_a_full_disk_is_named(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dpo_reference, "save_file", full)
    with pytest.raises(CheckpointError, match=rf"{FILE}: could not write.*No space left.*free space"):
        train(directory, tmp_path / "run")


def test_a_start_without_a_checkpoint_computes_again(directory: Path, tmp_path: Path) -> None:
    """A file from a run that never took a step may belong to another policy: it is not trusted."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "config.json").write_text('{"algorithm": "dpo"}')
    (out / FILE).write_bytes(b"stale")
    train(directory, out)
    assert load_file(out / FILE)["train"].shape == (3, 2)


def test_a_reference_that_is_not_finite_is_an_error(directory: Path, tmp_path: Path) -> None:
    policy = load_policy(directory, trainable=True)
    with torch.no_grad():
        policy.trainable_parameters()[0][:] = torch.nan
    config = config_of(directory)
    with pytest.raises(
        EquipoiseError, match="log-probability of 3 train pairs is not finite, the first of them pair 0"
    ):
        train_dpo(policy, RECORDS, config, Run(tmp_path / "run", config))


def test_the_digest_tells_prompt_from_response_and_one_split_from_another() -> None:
    pair, moved = EncodedPair([1, 2], [3], [4]), EncodedPair([1], [2, 3], [4])
    digests = {
        digest_of(splits)
        for splits in (
            {"train": [pair], "validation": []},
            {"train": [moved], "validation": []},
            {"train": [], "validation": [pair]},
            {"train": [pair, pair], "validation": []},
        )
    }
    assert len(digests) == 4
    assert digest_of({"validation": [], "train": [pair]}) == digest_of({"train": [pair], "validation": []})


def test_every_process_fills_its_own_rows(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two processes add up to those of one, bit by bit where the passes are the same."""
    config = config_of(directory)
    policy, run = load_policy(directory, trainable=True), Run(tmp_path / "run", config)
    pairs, counter = encode_pairs(policy, RECORDS, 100)[0], dpo.FlopCounter.of(policy.module)
    whole = dpo_reference._own_logprobs(policy, pairs, 1, counter, run)
    monkeypatch.setattr(Run, "num_processes", 2)
    summed = torch.zeros_like(whole)
    for rank in (0, 1):
        monkeypatch.setattr(Run, "rank", rank)
        own = dpo_reference._own_logprobs(policy, pairs, 1, counter, run)
        assert (own != 0).all(dim=1).tolist() == [rank == 0, rank == 1, rank == 1]
        summed += own
    assert torch.equal(summed, whole)
