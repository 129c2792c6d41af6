"""A key-value cache for decoding groups: a prompt's keys and values are kept once for all of its completions.

Prompts are stored per prompt [P, Hkv, S, D], padded on the left; what a row has sampled per row [B, Hkv, T, D], in a
buffer that is written in place. `grouped_attention` reads both. Rows may have any lengths of their own, so that
finished rows can leave and others join while the batch goes on.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from equipoise.models import packed_attention

ATTENTION = "equipoise_grouped"
REPLACES = ("sdpa", "eager", packed_attention.NAME)  # what computes the same numbers; flash kernels want other caches
FIRST_ROOM = 64  # tokens per row that the buffers start with; they grow by doubling

_current: ContextVar[GroupedCache] = ContextVar("equipoise_grouped_cache")


class _OwnTokens(DynamicLayer):
    """One layer's keys and values of the tokens that rows sampled, behind the interface that models expect."""

    def __init__(self, cache: GroupedCache, prompt_keys: Tensor, prompt_values: Tensor) -> None:
        super().__init__()
        # The cache owns its layers. A reference back would make a ring, and a ring with a batch's keys and values in it
        # stays until Python's collector happens to run, several batches later.
        self.cache: GroupedCache = weakref.proxy(cache)
        self.prompt_keys, self.prompt_values = prompt_keys, prompt_values  # [P, Hkv, S, D]
        self.buffers: tuple[Tensor, Tensor] | None = None  # keys and values [B, Hkv, room, D]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token per row; returns the rows' own keys and values so far [B, Hkv, T, D]."""
        buffers = self.own()
        cache, rows = self.cache, len(key_states)
        for buffer, new in zip(buffers, (key_states, value_states), strict=True):
            if cache.same_length:
                buffer[:rows, :, cache.longest] = new[:, :, 0]
            else:
                buffer[torch.arange(rows, device=new.device), :, cache.lengths_B] = new[:, :, 0]
        keys, values = buffers
        return keys[:rows, :, : cache.longest + 1], values[:rows, :, : cache.longest + 1]

    def own(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the rows' own tokens [>= B, Hkv, room, D], with room for one more in every row."""
        if self.buffers is None or self.buffers[0].shape[2] <= self.cache.longest:
            room = FIRST_ROOM if self.buffers is None else 2 * self.buffers[0].shape[2]
            self.resize(room=min(max(room, self.cache.longest + 1), self.cache.most_tokens))
        assert self.buffers is not None
        return self.buffers

    def resize(self, *, room: int) -> None:
        """Buffers for the batch's rows with `room` tokens each; what was written stays."""
        grown = []
        for number, like in enumerate((self.prompt_keys, self.prompt_values)):
            # Zeros: what a row has not written is hidden by a weight of 0, and 0 times a stray NaN is NaN.
            new = like.new_zeros(len(self.cache.lengths_B), like.shape[1], room, like.shape[3])
            if self.buffers is not None:
                old = self.buffers[number]
                kept = min(len(old), len(new))
                new[:kept, :, : self.cache.longest] = old[:kept, :, : self.cache.longest]
            grown.append(new)
        self.buffers = (grown[0], grown[1])

    def keep(self, rows: Tensor, prompts: Tensor) -> None:
        """Only these rows and these prompts stay, in this order."""
        if self.buffers is not None:
            keys, values = (buffer[rows, :, : self.cache.longest + 1] for buffer in self.buffers)
            self.buffers = (keys, values)
        if len(prompts) < len(self.prompt_keys):
            self.prompt_keys, self.prompt_values = self.prompt_keys[prompts], self.prompt_values[prompts]

    def join(self, other_keys: Tensor, other_values: Tensor) -> None:
        """More prompts, and rows without tokens of their own."""
        self.prompt_keys = _stacked(self.prompt_keys, other_keys)
        self.prompt_values = _stacked(self.prompt_values, other_values)
        if self.buffers is not None:
            self.resize(room=self.buffers[0].shape[2])

    def get_seq_length(self) -> int:
        """Tokens of the longest row, its prompt included."""
        return self.prompt_keys.shape[2] + self.cache.longest


def _without_padding(part: Tensor, mask_PS: Tensor) -> Tensor:
    """Zeros where a prompt is padded: some attentions leave NaN there, which a weight of 0 does not hide."""
    return part if bool(mask_PS.all()) else torch.where(mask_PS[:, None, :, None], part, 0.0)


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    """[P1, Hkv, S1, D] and [P2, Hkv, S2, D] as [P1+P2, Hkv, max S, D], zeros on the left."""
    length = max(first.shape[2], second.shape[2])
    return torch.cat([nn.functional.pad(part, (0, 0, length - part.shape[2], 0)) for part in (first, second)])


class GroupedCache(Cache):
    """Cache of P prompts and B rows, each row a completion of one prompt.

    `prompt_of_B` may be in any order; rows that fill an even P x G grid in order need no index.
    """

    def __init__(
        self,
        prefilled: Iterable[tuple[Tensor, Tensor]],
        prompt_mask_PS: Tensor,
        group_size: int,
        most_tokens: int,
    ) -> None:
        """`prefilled` are keys and values [P, Hkv, S, D] of every layer, padded on the left as `prompt_mask_PS` says;
        `most_tokens` a row may sample.
        """
        self.most_tokens = most_tokens
        self.prompt_mask_PS = prompt_mask_PS
        device = prompt_mask_PS.device
        self.prompt_of_B = torch.arange(len(prompt_mask_PS), device=device).repeat_interleave(group_size)
        self.lengths_B = torch.zeros(len(self.prompt_of_B), dtype=torch.long, device=device)
        self.longest, self.same_length = 0, True
        self.hidden: Tensor | None = None
        layers = [_OwnTokens(self, *(_without_padding(part, prompt_mask_PS) for part in layer)) for layer in prefilled]
        super().__init__(layers=layers)  # type: ignore[arg-type]
        self._arrange()

    @property
    def dtype(self) -> torch.dtype:
        """Of keys and values."""
        return self.layers[0].prompt_keys.dtype  # type: ignore[union-attr]

    def _arrange(self) -> None:
        """Where each row lies in the grid of prompts, and what of the prompts is padding."""
        num_prompts, rows = len(self.prompt_mask_PS), len(self.prompt_of_B)
        counts_P = torch.bincount(self.prompt_of_B, minlength=num_prompts)
        self.num_prompts, self.per_prompt = num_prompts, int(counts_P.max()) if rows else 0
        order = self.prompt_of_B.argsort(stable=True)
        firsts_P = counts_P.cumsum(0) - counts_P
        within = torch.empty_like(self.prompt_of_B)
        within[order] = torch.arange(rows, device=order.device) - firsts_P[self.prompt_of_B[order]]
        slots_B = self.prompt_of_B * self.per_prompt + within
        in_order = rows == num_prompts * self.per_prompt and bool(
            (slots_B == torch.arange(rows, device=slots_B.device)).all()
        )
        self.slots_B = None if in_order else slots_B
        hidden = ~self.prompt_mask_PS
        self.hidden_of_P = hidden.sum(dim=1)  # on the left
        self.prompt_hidden_PS = hidden if bool(hidden.any()) else None

    def _hidden(self) -> Tensor | None:
        """[B, S+T]: padding of the prompt, and what lies behind a row's newest token; None where nothing is hidden."""
        if self.prompt_hidden_PS is None and self.same_length:
            return None
        columns = torch.arange(self.longest + 1, device=self.lengths_B.device)
        return torch.cat([~self.prompt_mask_PS[self.prompt_of_B], columns > self.lengths_B[:, None]], dim=1)

    def advanced(self) -> None:
        """Every row has got one token more.

        A finished row is fed on while it waits to leave, for longer than `most_tokens` where others joined later; it
        then writes over its last place, which no row that goes on ever gets to.
        """
        self.lengths_B = (self.lengths_B + 1).clamp(max=self.most_tokens - 1)
        self.longest = min(self.longest + 1, self.most_tokens - 1)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these, and prompts that nobody needs any more."""
        prompts, self.prompt_of_B = self.prompt_of_B[rows].unique(return_inverse=True)
        self.lengths_B = self.lengths_B[rows]
        for layer in self.layers:
            layer.keep(rows, prompts)  # type: ignore[union-attr]
        self.prompt_mask_PS = self.prompt_mask_PS[prompts]
        self._measure()
        self._arrange()

    def join(self, other: GroupedCache) -> None:
        """The rows of a fresh cache join, behind those that are here."""
        length = max(self.prompt_mask_PS.shape[1], other.prompt_mask_PS.shape[1])
        masks = [nn.functional.pad(m, (length - m.shape[1], 0)) for m in (self.prompt_mask_PS, other.prompt_mask_PS)]
        self.prompt_of_B = torch.cat([self.prompt_of_B, other.prompt_of_B + len(self.prompt_mask_PS)])
        self.lengths_B = torch.cat([self.lengths_B, other.lengths_B])
        self.prompt_mask_PS = torch.cat(masks)
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.join(theirs.prompt_keys, theirs.prompt_values)  # type: ignore[union-attr]
        self._measure()
        self._arrange()

    def _measure(self) -> None:
        self.longest = int(self.lengths_B.max()) if len(self.lengths_B) else 0
        self.same_length = bool((self.lengths_B == self.longest).all())

    def hide(self) -> None:
        """Work out what no row may look at, once for all layers of the coming step."""
        self.hidden = self._hidden()

    @contextmanager
    def active(self, causal: Any) -> Iterator[None]:
        """While this lasts, the model's attention reads this cache."""
        config = causal.config.get_text_config()
        before = config._attn_implementation
        self.hide()
        token = _current.set(self)
        config._attn_implementation = ATTENTION
        try:
            yield
        finally:
            config._attn_implementation = before
            _current.reset(token)


def grouped_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one new token per row over its prompt and its own tokens.

    `query` [B, H, 1, D], `key` and `value` [B, Hkv, T, D] the rows' own; returns [B, 1, H, D].
    """
    cache = _current.get()
    layer: Any = cache.layers[module.layer_idx]  # type: ignore[index]
    rows, heads, _, width = query.shape
    scale = width**-0.5 if scaling is None else scaling
    query_BKRD = query.view(rows, key.shape[1], heads // key.shape[1], width)
    result = attend(query_BKRD * scale, key, value, layer, softcap)
    return result.view(rows, 1, heads, width), None


def attend(query_BKRD: Tensor, key: Tensor, value: Tensor, layer: _OwnTokens, softcap: float | None = None) -> Tensor:
    """Scaled queries of one new token per row over its prompt and its own keys and values; like `query_BKRD`.

    Suffixes: P prompts, B rows, K key heads, R queries per key head, G rows per prompt in the grid, S prompt and T own
    tokens. A prompt's keys meet the queries of all its rows in one product; the scores of both parts share one softmax.
    Arithmetic, one row, scores ln 1 for the prompt's token and ln 3 for its own: weights 1/4 and 3/4.
    """
    cache, queries = layer.cache, query_BKRD.shape[2]
    own = query_BKRD @ key.transpose(-1, -2)  # [B, K, R, T]
    prompt = _of_rows(_in_grid(query_BKRD, cache) @ layer.prompt_keys.transpose(-1, -2), cache, queries)  # [B, K, R, S]
    length = prompt.shape[-1]
    scores = torch.cat([prompt, own], dim=-1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if cache.hidden is not None:
        scores.masked_fill_(cache.hidden[:, None, None], -torch.inf)
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, dim=-1, dtype=dtype).to(value.dtype)
    result = weights[..., length:] @ value
    result += _of_rows(_in_grid(weights[..., :length], cache) @ layer.prompt_values, cache, queries)
    return result


def _in_grid(rows_BKRX: Tensor, cache: GroupedCache) -> Tensor:
    """[B, Hkv, R, X] as [P, Hkv, G*R, X]: the rows of a prompt side by side, 0 where a prompt has fewer than G."""
    if cache.slots_B is not None:
        grid = rows_BKRX.new_zeros(cache.num_prompts * cache.per_prompt, *rows_BKRX.shape[1:])
        rows_BKRX = grid.index_copy_(0, cache.slots_B, rows_BKRX)
    return rows_BKRX.unflatten(0, (cache.num_prompts, cache.per_prompt)).transpose(1, 2).flatten(2, 3)


def _of_rows(grid_PKQX: Tensor, cache: GroupedCache, queries: int) -> Tensor:
    """The way back: [P, Hkv, G*R, X] as [B, Hkv, R, X]."""
    rows = grid_PKQX.unflatten(2, (cache.per_prompt, queries)).transpose(1, 2).flatten(0, 1)
    return rows if cache.slots_B is None else rows[cache.slots_B]


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, grouped_attention)


def groups_share_prompts(causal: Any, most_positions: int) -> str | None:
    """None where this model's attention is known to work with `GroupedCache`, else why not.

    `most_positions` is the longest prompt plus what may be sampled: a sliding window shorter than that would cut.
    """
    config = causal.config.get_text_config()
    implementation = getattr(config, "_attn_implementation", None)
    if implementation not in REPLACES:
        return f"its attention is {implementation}"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not kinds <= {"full_attention", "sliding_attention"}:
        return f"it has layers of the kind {', '.join(sorted(kinds - {'full_attention', 'sliding_attention'}))}"
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in kinds or (not getattr(config, "layer_types", None) and window)
    if slides and window is not None and window < most_positions:
        return f"its sliding window of {window} is shorter than prompt and completion ({most_positions})"
    return None
