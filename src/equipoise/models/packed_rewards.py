"""Outputs of a reward model that is a decoder of the usual block: rows packed without padding, equal prompts once.

Such a classifier reads its outputs off the last token of a row, which attends to all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from equipoise.models.decoder_blocks import BlockSpec, packed_hidden, specs_here
from equipoise.models.packed_attention import longest_packed
from equipoise.models.packing import pack
from equipoise.models.policy_module import UNFIT
from equipoise.models.products import NotPlain
from equipoise.models.usual_block import relative_difference

TOLERANCE = 1e-4  # relative, root mean squares; float32 leaves about 1e-6


def packed_logits(
    model: Any, blocks: list[BlockSpec], ids_BL: Tensor, mask_BL: Tensor, shared: int | Sequence[int] = 0
) -> Tensor:
    """What a sequence classifier answers [B, outputs] for rows padded on the right, none beyond its window.

    `shared`: how many first tokens of each row may be those of another. As in transformers the answer is read off the
    last token that is not the pad token, padding or not.
    """
    packing = pack(ids_BL, mask_BL, shared)
    pad = model.config.get_text_config().pad_token_id
    columns = torch.arange(ids_BL.shape[1], device=ids_BL.device)
    last_B1 = (columns * (mask_BL.bool() if pad is None else ids_BL != pad)).argmax(dim=1, keepdim=True)
    last_B = packing.token_BL.gather(1, last_B1)[:, 0]
    return model.score(packed_hidden(model, blocks, packing).index_select(0, last_B))


@torch.no_grad()
def packing_fault(model: Any) -> str | None:
    """Why this model's rows cannot be packed, None where a probe gives the outputs of padded rows.

    The probe shares a prompt between two rows of unequal length and has one that stands alone.
    """
    if not hasattr(model, "score"):
        return "it has no layer `score`"
    weight = model.get_input_embeddings().weight
    if weight.device.type != "cpu":
        return f"it is on {weight.device.type}"
    pad = model.config.get_text_config().pad_token_id
    usable = [token for token in range(min(64, weight.shape[0])) if token != pad]
    if longest_packed(model.config) < 5:
        return "its window holds hardly a token"
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    ids = torch.tensor(usable)[torch.arange(15).remainder(len(usable))].reshape(3, 5)
    ids[1, :2] = ids[0, :2]
    ids = ids.masked_fill(mask == 0, usable[0] if pad is None else pad)
    ids[2, 3] = ids[1, 4]  # a pad token that is none of padding
    was_training = model.training
    model.eval()
    try:
        padded = model(input_ids=ids, attention_mask=mask).logits.float()
        packed = packed_logits(model, specs_here(model), ids, mask, 2).float()
    except (NotPlain, *UNFIT) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        model.train(was_training)
    difference = relative_difference(packed, padded)
    return None if difference <= TOLERANCE else f"its outputs differ by {difference:.1e}"
