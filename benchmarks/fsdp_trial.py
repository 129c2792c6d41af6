"""Try FSDP2 on two CPU ranks: train a recipe with the policy sharded by accelerate's own FSDP2 code.

    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no \
        --dynamo_backend no benchmarks/fsdp_trial.py RECIPE.yaml --out DIR

accelerate ignores --use_fsdp on CPU ranks and falls back to DDP without a word, so this sets the plugin after
start-up. What works and what does not: docs/results/distributed.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from equipoise.cli import train as command


def sharding_accelerator() -> Accelerator:
    """An Accelerator of two gloo ranks that prepares models with `fully_shard`."""
    accelerator = Accelerator()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="SHARDED_STATE_DICT"
    )
    state = AcceleratorState()
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    assert accelerator.is_fsdp2
    return accelerator


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    command.Accelerator = sharding_accelerator  # type: ignore[assignment]
    try:
        command.train_recipe(options.recipe, options.overrides, options.out, options.resume)
        print("processes:", torch.distributed.get_world_size())
    finally:
        command.end_processes()


if __name__ == "__main__":
    main()
