"""`PolicyModule`: backbone, vocabulary projection and optional value head behind one forward.

It is the only thing that data parallelism or sharding wraps. Calling the inner model and its head from outside
would bypass the wrapper's hooks: silently wrong gradients under DDP, an error under FSDP2.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from equipoise.errors import ConfigError
from equipoise.functional.logprobs import ProjectedScores, chunked_logprobs, linear_logprobs
from equipoise.functional.masking import at_least_float32
from equipoise.models import packed_attention
from equipoise.models.decoder_blocks import block_specs, packed_hidden, specs_here
from equipoise.models.packing import Packing, pack
from equipoise.models.products import NotPlain, dtype_of_products
from equipoise.models.usual_block import relative_difference

logger = logging.getLogger(__name__)

# What a model whose layers do not take our attention, or are not what their names say, may raise in a probe.
UNFIT = (RuntimeError, ValueError, TypeError, AttributeError, LookupError)
PROJECTION_CHUNK = 1024  # positions projected onto the vocabulary at once: chunk x V is the largest temporary
PROJECTION_NUMBERS = 2**25  # chunk x V is at most this, or 64 x V: 128 MiB in float32


class TokenScores(NamedTuple):
    """Suffixes: B rows, T completion tokens. Entries outside the mask are 0."""

    logprobs_BT: Tensor  # at the temperature asked for
    entropy_BT: Tensor | None  # detached, in nats, of the same distribution
    unit_logprobs_BT: Tensor | None  # detached, at temperature 1
    values_BT: Tensor | None  # of the value head, before each completion token


class ValueHead(nn.Module):
    """A scalar per position from the last hidden state; starts at 0, so that the first values are 0."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] to [...], in float32 (float64 where the head is)."""
        return at_least_float32(self.linear(hidden.to(self.linear.weight.dtype)).squeeze(-1))


class PolicyModule(nn.Module):
    """A causal language model that returns log-probabilities of given completions, never B x T x V logits.

    Rows are scored as one packed row without padding, equal prompts once, where a probe shows that the architecture
    gives the same hidden states that way; `packed = False` scores them padded.
    """

    packed: bool = True

    def __init__(self, model: nn.Module, *, autocast: bool = False, value_head: bool = False) -> None:
        super().__init__()
        self.model = model  # a transformers causal LM, or a peft model around one
        self.autocast = autocast
        text_config = self.causal.config.get_text_config()
        self.value_head = ValueHead(text_config.hidden_size) if value_head else None
        self._transform = logit_transform(text_config)
        self._takes_positions = "position_ids" in inspect.signature(self._backbone.forward).parameters
        self._projects = True  # False: the head does something unknown, the model's own logits are used
        self._check_projection()
        if value_head and not self._projects:
            raise ConfigError(
                f"{type(self.causal).__name__}: no value head fits a model whose logits Equipoise cannot rebuild from "
                "its hidden states; use a critic of its own, or GRPO"
            )
        self._said: set[str] = set()
        self._own_blocks = False  # True: packed rows go through hand-written blocks, not through the model's layers
        self._longest_packed = self._check_packing()  # tokens of a sequence; 0: this architecture is never packed

    @property
    def causal(self) -> Any:
        """The transformers causal LM, with LoRA layers in place where peft put them."""
        get_base = getattr(self.model, "get_base_model", None)
        return get_base() if get_base is not None else self.model

    @property
    def packs(self) -> bool:
        """Whether rows are packed, so far as their lengths allow."""
        return self.packed and self._longest_packed > 0

    @property
    def projects(self) -> bool:
        """Whether the logits are the head's product with the last hidden states, and `transform` of it."""
        return self._projects

    @property
    def transform(self) -> LogitTransform | None:
        """What the model does to its logits after the head."""
        return self._transform

    @property
    def _backbone(self) -> Any:
        return self.causal.base_model

    @property
    def _head(self) -> nn.Module:
        return self.causal.get_output_embeddings()

    def precision_context(self) -> AbstractContextManager[Any]:
        """bfloat16 autocast where the policy asked for it; sampler and trainer go through the same one."""
        device = next(self.parameters()).device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.autocast)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """No gradients, eval mode and the module's precision; its mode is restored."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad(), self.precision_context():
                yield
        finally:
            self.train(was_training)

    def _hidden(self, ids_BL: Tensor, mask_BL: Tensor, position_ids_BL: Tensor, **options: Any) -> Any:
        if self._takes_positions:
            options["position_ids"] = position_ids_BL
        return self._backbone(input_ids=ids_BL, attention_mask=mask_BL.long(), **options)

    def _project(self, hidden: Tensor) -> Tensor:
        logits = self._head(hidden)
        return self._transform(at_least_float32(logits)) if self._transform is not None else logits

    def _check_projection(self) -> None:
        """Compare backbone + head with the model's own forward once, on a probe.

        An architecture that scales or caps its logits in a way we do not know would train on a wrong distribution
        without any error; it falls back to its own logits instead, and says so.
        """
        device = next(self.parameters()).device
        if device.type == "meta":
            return
        vocabulary = self.causal.get_input_embeddings().weight.shape[0]
        ids = torch.arange(3, 9, device=device).remainder(vocabulary)[None]
        mask = torch.ones_like(ids)
        with self.inference():
            own = self.causal(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
            hidden = self._hidden(ids, mask, torch.arange(6, device=device)[None], use_cache=False).last_hidden_state
            ours = self._project(hidden).float()
        low_precision = self.autocast or next(self._head.parameters()).dtype in (torch.bfloat16, torch.float16)
        allowed = (2e-2 if low_precision else 1e-4) * own.abs().max().clamp(min=1e-6)
        self._projects = ours.shape == own.shape and bool((ours - own).abs().max() <= allowed)
        if not self._projects:
            logger.warning(
                "%s transforms its logits in a way Equipoise does not know: using the model's own logits, "
                "which needs memory for a row's length times the vocabulary",
                type(self.causal).__name__,
            )

    def _check_packing(self) -> float:
        """Tokens up to which a sequence may be packed, after comparing packed with padded rows on a probe.

        Recurrent layers, learned biases of position and the like would give wrong hidden states without any error.
        A window is not probed: sequences that fit into it are as good as without one, longer ones are not packed.
        """
        causal, device = self.causal, next(self.parameters()).device
        known = getattr(causal.config.get_text_config(), "_attn_implementation", None) == "sdpa"
        if not (self._projects and self._takes_positions and known and device.type != "meta"):
            logger.info("%s: rows are scored padded, not packed", type(causal).__name__)
            return 0
        longest = packed_attention.longest_packed(causal.config)
        if longest < 4:
            return 0
        mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0]], dtype=torch.bool, device=device)
        ids = torch.tensor([[0, 3, 4, 5], [6, 7, 8, 9], [6, 7, 10, 0], [11, 3, 5, 0]], device=device)
        ids = ids.remainder(causal.get_input_embeddings().weight.shape[0])
        was_training = self.training
        self.eval()
        causal.set_attn_implementation(packed_attention.NAME)
        reason = self._packing_fault(ids, mask)
        if reason is None:
            self._check_own_blocks(ids, mask)
        self.train(was_training)
        if reason is None:
            return longest
        causal.set_attn_implementation("sdpa")
        logger.warning("%s: rows are scored padded, not packed: %s", type(causal).__name__, reason)
        return 0

    def _check_own_blocks(self, ids_BL: Tensor, mask_BL: Tensor) -> None:
        """Whether packed rows may go through hand-written blocks, on the same probe."""
        if ids_BL.device.type != "cpu":
            return  # not tried on a GPU
        try:
            block_specs(self.causal, torch.float32)
            self._own_blocks = True
            fault = self._packing_fault(ids_BL, mask_BL)
        except NotPlain as error:
            fault = str(error)
        except UNFIT as error:
            fault = f"{type(error).__name__}: {error}"
        if fault is not None:
            self._own_blocks = False
            logger.info("%s: rows are scored by the model's own layers: %s", type(self.causal).__name__, fault)

    @torch.no_grad()
    def _packing_fault(self, ids_BL: Tensor, mask_BL: Tensor) -> str | None:
        """How the hidden states of packed rows differ from those of padded ones; None where they do not."""
        try:
            padded = self.hidden_states(ids_BL, mask_BL)[mask_BL].float()
            ours = self._hidden_of(pack(ids_BL, mask_BL, 2))[mask_BL].float()
        except UNFIT as error:
            return f"{type(error).__name__}: {error}"
        allowed = 5e-2 if next(self._backbone.parameters()).dtype in (torch.bfloat16, torch.float16) else 1e-4
        difference = relative_difference(ours, padded)
        return None if difference <= allowed else f"its hidden states differ by {difference:.1e}"

    def _packing(self, ids_BL: Tensor, mask_BL: Tensor, first: int, wanted_BT: Tensor | None) -> Packing | None:
        """How to pack these rows; None where they must stay padded."""
        if not self.packs:
            return None
        if self.causal.config.get_text_config()._attn_implementation != packed_attention.NAME:
            return None  # somebody chose another attention after this module was built
        real = mask_BL.bool()
        if not real.any() or int(real.sum(dim=1).max()) > self._longest_packed:
            return None
        if wanted_BT is not None and bool((wanted_BT & ~real[:, first - 1 : -1]).any()):
            return None  # asks for what follows a padded column, e.g. after an empty prompt
        return pack(ids_BL, real, first)

    def _hidden_of(self, packing: Packing) -> Tensor:
        """Last hidden states of the packed tokens, as padded rows [B, L, H]; those of padding mean nothing."""
        return self._packed_hidden(packing)[packing.token_BL]

    def _packed_hidden(self, packing: Packing) -> Tensor:
        """Last hidden states [N, H] of the packed tokens."""
        if self._own_blocks and packing.ids_1N.device.type == "cpu":
            try:
                specs = specs_here(self.causal)
            except (NotPlain, *UNFIT) as error:  # a model may change after it was tried: hooks of a wrapper, a merge
                self._say_own_layers(str(error))
            else:
                return packed_hidden(self.causal, specs, packing)
        # A mask of four dimensions is taken as it is, so that none is built for N x N pairs.
        ready = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=packing.ids_1N.device)
        return self._backbone(
            input_ids=packing.ids_1N,
            attention_mask=ready,
            position_ids=packing.position_ids_1N,
            use_cache=False,
            packing=packing,
        ).last_hidden_state[0]

    def _say_own_layers(self, why: str) -> None:
        if why not in self._said:
            self._said.add(why)
            logger.warning("%s: rows go through the model's own layers now: %s", type(self.causal).__name__, why)

    def forward(
        self,
        ids_BL: Tensor,
        mask_BL: Tensor,
        completion_mask_BT: Tensor,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
        with_unit_logprobs: bool = False,
        with_values: bool = False,
    ) -> TokenScores:
        """Log-probabilities of the last T columns of `ids_BL`, each given everything before it.

        Args:
            ids_BL: prompt and completion ids; the completion fills the last T columns, padded on the right.
            mask_BL: True where a token is real; prompts may be padded on the left.
            completion_mask_BT: True where a log-probability is wanted.
            temperature: divides the logits.
            with_entropy, with_unit_logprobs, with_values: also fill those fields of the result.
        """
        first = ids_BL.shape[1] - completion_mask_BT.shape[1]
        wanted = completion_mask_BT
        with self.precision_context():
            hidden_NH, projection = self._hidden_before(ids_BL, mask_BL, first, wanted)
            logprobs_N, entropy_N, unit_N = self._scores_of(
                hidden_NH, ids_BL[:, first:][wanted], projection, temperature, with_entropy, with_unit_logprobs
            )
        values_N = None
        if with_values:
            if self.value_head is None:
                raise ValueError("this policy has no value head; build it with value_head=True")
            values_N = self.value_head(hidden_NH)

        def spread(values_N: Tensor | None) -> Tensor | None:
            if values_N is None:
                return None
            return torch.zeros(wanted.shape, dtype=values_N.dtype, device=values_N.device).masked_scatter(
                wanted, values_N
            )

        spread_logprobs = spread(logprobs_N)
        assert spread_logprobs is not None
        return TokenScores(spread_logprobs, spread(entropy_N), spread(unit_N), spread(values_N))

    def _scores_of(
        self,
        hidden_NH: Tensor,
        targets_N: Tensor,
        projection: Callable[[Tensor], Tensor],
        temperature: float,
        with_entropy: bool,
        with_unit_logprobs: bool,
    ) -> ProjectedScores:
        """The targets' log-probabilities, chunk by chunk; one pass where the head is a matrix and nothing else."""
        linear = _plain_linear(self._head) if self._projects else None
        chunk = min(PROJECTION_CHUNK, max(64, PROJECTION_NUMBERS // self.causal.get_input_embeddings().weight.shape[0]))
        if linear is not None:
            transform = self._transform or LogitTransform()
            return linear_logprobs(
                hidden_NH,
                linear.weight,
                linear.bias,
                targets_N,
                temperature=temperature,
                chunk_size=chunk,
                scale=transform.factor,
                cap=transform.cap,
                product_dtype=dtype_of_products(linear.weight),
                with_entropy=with_entropy,
                with_unit_logprobs=with_unit_logprobs,
            )

        def scored(at: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
            return chunked_logprobs(
                hidden_NH, projection, targets_N, temperature=at, chunk_size=chunk, with_entropy=entropy
            )

        logprobs_N, entropy_N = scored(temperature, with_entropy)
        unit_N = None
        if with_unit_logprobs:
            with torch.no_grad():
                unit_N = logprobs_N.detach() if temperature == 1.0 else scored(1.0, False)[0]
        return ProjectedScores(logprobs_N, entropy_N, unit_N)

    def _hidden_before(
        self, ids_BL: Tensor, mask_BL: Tensor, first: int, wanted_BT: Tensor
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """What predicts the wanted columns from `first` on [N, H or V], and how to turn it into logits."""
        if self._projects:
            packing = self._packing(ids_BL, mask_BL, first, wanted_BT)
            if packing is not None:
                places_N = packing.token_BL[:, first - 1 : -1][wanted_BT]
                return self._packed_hidden(packing).index_select(0, places_N), self._project
            hidden_BLH = self.hidden_states(ids_BL, mask_BL)
            return hidden_BLH[:, first - 1 : -1][wanted_BT], self._project
        options = {"position_ids": _position_ids(mask_BL)} if self._takes_positions else {}
        output = self.causal(input_ids=ids_BL, attention_mask=mask_BL.long(), use_cache=False, **options)
        return output.logits[:, first - 1 : -1][wanted_BT], lambda logits: logits

    def hidden_states(self, ids_BL: Tensor, mask_BL: Tensor, *, first: int | None = None) -> Tensor:
        """Last hidden states [B, L, H] of padded rows: what a head other than the vocabulary's reads.

        With `first`, the column where prompts end, rows are packed; the states of padding then mean nothing.
        """
        packing = None if first is None else self._packing(ids_BL, mask_BL, first, None)
        if packing is not None:
            return self._hidden_of(packing)
        return self._hidden(ids_BL, mask_BL, _position_ids(mask_BL), use_cache=False).last_hidden_state

    def next_token_logits(
        self, ids_BL: Tensor, mask_BL: Tensor, position_ids_BL: Tensor, cache: Any | None
    ) -> tuple[Tensor, Any]:
        """One decoding step: float32 logits [B, V] after the last column of `ids_BL`, and the grown cache.

        `mask_BL` covers cached and new tokens; `ids_BL` and `position_ids_BL` the new ones only.
        """
        with self.precision_context():
            if self._projects:
                output = self._hidden(ids_BL, mask_BL, position_ids_BL, past_key_values=cache, use_cache=True)
                logits = self._project(output.last_hidden_state[:, -1])
            else:
                options = {"position_ids": position_ids_BL} if self._takes_positions else {}
                output = self.causal(
                    input_ids=ids_BL, attention_mask=mask_BL.long(), past_key_values=cache, use_cache=True, **options
                )
                logits = output.logits[:, -1]
        return logits.float(), getattr(output, "past_key_values", None)


def _position_ids(mask_BL: Tensor) -> Tensor:
    """Positions from the first real token of a row on; those of padding before it are 0."""
    return (mask_BL.long().cumsum(dim=1) - 1).clamp(min=0)


def _plain_linear(head: nn.Module) -> nn.Linear | None:
    """The head, where calling it is `W h + b` and nothing else: no adapter, hook, shard or quantised weight."""
    if type(head) is not nn.Linear or isinstance(head.weight, DTensor) or not head.weight.is_floating_point():
        return None
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    return None if any(hooks) else head


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to its logits after the head: z becomes factor * z, then cap * tanh(z / cap)."""

    factor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        logits = logits * self.factor
        return torch.tanh(logits / self.cap) * self.cap if self.cap is not None else logits


def logit_transform(config: Any) -> LogitTransform | None:
    """What an architecture does to its logits after the head: scaling (Cohere, Granite), soft-capping (Gemma).

    Returns None where there is nothing to do. `PolicyModule` checks the result against the model's own forward.
    """
    factor = 1.0
    if getattr(config, "model_type", "").startswith("cohere"):
        factor *= float(getattr(config, "logit_scale", None) or 1.0)
    if getattr(config, "logits_scaling", None):
        factor /= float(config.logits_scaling)
    cap = getattr(config, "final_logit_softcapping", None)
    return None if cap is None and factor == 1.0 else LogitTransform(factor, cap)
