"""What a plan adds on a CPU for memory that was freed and is kept."""

from __future__ import annotations

import platform
from dataclasses import replace
from pathlib import Path

import pytest

from equipoise.config import ModelConfig
from equipoise.models.footprint import Batch, Network, model_config_of, policy_network, update_terms
from equipoise.studies.planning_allocator import KEPT_TERM, SCRATCH, scratch_terms, training_terms

SMALL, LARGE = Batch(2, 8, 20, 16), Batch(64, 512, 20, 16)  # 168 and 9,472 tokens


@pytest.fixture
def net(tmp_path: Path) -> Network:
    """Feed-forward layers of 1,000 numbers: 4,000 bytes a token, so that 32 MiB are 8,389 tokens."""
    file = tmp_path / "config.json"
    file.write_text(
        '{"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, '
        '"num_attention_heads": 2, "intermediate_size": 1000}'
    )
    found = policy_network(ModelConfig(model="toy", precision="float32"), model_config_of(file))
    assert found.usual
    return replace(found, usual=False)


@pytest.mark.parametrize(
    ("variables", "library", "batch", "on_gpu", "share"),
    [
        ({}, "glibc", SMALL, False, 0.2),
        ({}, "glibc", SMALL, True, None),
        ({}, "glibc", LARGE, False, 0.0),  # blocks of over 32 MiB are mapped one by one, and returned
        ({}, "", SMALL, False, None),  # another C library
        ({"MALLOC_MMAP_THRESHOLD_": "131072"}, "glibc", SMALL, False, None),
        ({"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=131072"}, "glibc", SMALL, False, None),
        ({"LD_PRELOAD": "/usr/lib/libjemalloc.so.2"}, "glibc", SMALL, False, None),
    ],
)
def test_a_share_of_the_activations_is_kept(
    variables: dict[str, str], library: str, batch: Batch, on_gpu: bool, share: float | None, net: Network,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(platform, "libc_ver", lambda: (library, "2.36"))
    plain, found = update_terms(net, batch, 1, on_gpu=on_gpu), training_terms(net, batch, 1, on_gpu=on_gpu)
    assert found.pop(KEPT_TERM, None) == (None if share is None else share * plain["activations"])
    assert found == plain and plain["activations"] > 0
    assert list(scratch_terms(on_gpu=on_gpu).values()) == ([] if share is None else [SCRATCH])


def test_a_share_of_what_sampling_held_is_kept(net: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.6 of cache and laid out weights; what logits took is larger blocks, or needed again."""
    for name in ("MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    sampled = {"cache": 100.0, "weights laid out": 50.0, "logits": 1000.0}
    plain, found = training_terms(net, SMALL, 1), training_terms(net, SMALL, 1, sampled=sampled)
    assert found[KEPT_TERM] - plain[KEPT_TERM] == pytest.approx(90)
    assert training_terms(net, LARGE, 1, sampled=sampled)[KEPT_TERM] == pytest.approx(90)
