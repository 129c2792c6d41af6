"""What every rank of `test_packing_sharded` runs: packed scoring under FSDP2 against one process.

python -m torch.distributed.run --nproc_per_node 2 -m tests.packing_ranks OUT.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from equipoise.rollout.logprobs import score_tokens
from tests.invariant.test_packing import Widths, grouped_rollout, make
from tests.toy import toy_config


def compare(tied: bool) -> dict[str, Any]:
    """The largest differences of log-probabilities and gradients, and the shapes the sharded backbone was given."""
    whole, sharded = (make(toy_config("llama", tie_word_embeddings=tied), double=False) for _ in range(2))
    whole._own_blocks = False  # as the sharded one: its layers have hooks, so they are called
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in sharded.causal.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    widths, rollout = Widths(sharded), grouped_rollout()
    scores = [score_tokens(module, rollout).logprobs_BT for module in (whole, sharded)]
    for logprobs_BT in scores:
        logprobs_BT.sum().backward()
    gradients = 0.0
    for one, part in zip(whole.parameters(), sharded.parameters(), strict=True):
        gradients = max(gradients, float((one.grad - part.grad.full_tensor()).abs().max() / one.grad.abs().max()))
    return {"widths": widths.seen, "logprobs": float((scores[0] - scores[1]).detach().abs().max()), "grads": gradients}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found = [compare(False), compare(True)]
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found), encoding="utf-8")
    dist.barrier()  # one that ends first would take the other's connections down
    dist.destroy_process_group()
    # Caches of DTensor keep the mesh, and with it gloo's threads. One that lets go of a tensor while the interpreter
    # is taken down aborts the process (pytorch/pytorch#179291): once in some hundred runs, after all was written.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
