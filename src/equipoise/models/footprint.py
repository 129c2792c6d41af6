"""Bytes that a model needs to sample, to score and to be trained, from its shapes alone.

Nothing is allocated: a model is built on the meta device and counted. The terms follow what the code does, line by
line of a decoder like Llama or Qwen2: what autograd keeps of a token and layer, two chunks of logits, a prompt's cache
once for its group. Encoders and decoders of other makes come out near; mixtures of experts are refused. Suffixes as
everywhere: H hidden width, V vocabulary, I width of the feed-forward layer, N tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from equipoise.config import ModelConfig
from equipoise.errors import ConfigError
from equipoise.functional.projection import cached_rows
from equipoise.models.decode_step import most_copied
from equipoise.models.decoder_blocks import block_specs
from equipoise.models.flops import FlopCounter
from equipoise.models.loading import is_adapter, resolve_precision
from equipoise.models.packed_attention import LONG_PROMPT
from equipoise.models.packing import filled_up
from equipoise.models.policy_module import PROJECTION_CHUNK, PROJECTION_NUMBERS, UNFIT
from equipoise.models.products import NotPlain
from equipoise.models.reference import linear_weights

Terms = dict[str, float]  # bytes by what they are for

SINGLE = 4  # bytes of a float32
HALF = 2  # of a bfloat16


@dataclass(frozen=True)
class Network:
    """What memory depends on of one network. Counts are of numbers, not of bytes; sums are over a layer's average."""

    layers: int
    hidden: int
    heads: int
    key_heads: int
    head_width: int
    feed_forward: int
    vocabulary: int
    gated: bool  # three matrices in the feed-forward layer, rather than two
    frozen: int  # parameters that get no gradient
    trained: int
    embedding_trained: bool
    head_trained: bool
    tied: bool  # embedding and vocabulary projection are one table
    linear: int  # weights that linear layers alone read
    inputs_apart: float  # widths of the inputs of all matrices of a layer that are trained or adapted
    inputs_shared: float  # the same, an input that several read counted once
    ranks: float  # of a layer's adapters
    low: bool  # matrix products in bfloat16
    adapted: bool  # adapters on frozen weights
    checkpointing: bool
    head_norms: bool  # queries and keys are normed, head by head
    usual: bool  # its blocks are those of `decoder_blocks` and `decode_step`, and it runs on a CPU
    flops: FlopCounter

    @property
    def product(self) -> int:
        """Bytes of a number that a matrix product gives."""
        return HALF if self.low else SINGLE

    @property
    def residual(self) -> int:
        """Bytes of a number of the residual stream: as the embedding's, which stays float32 where it is trained."""
        return HALF if self.low and self.adapted else SINGLE

    @property
    def queries(self) -> int:
        """Width of the queries."""
        return self.heads * self.head_width

    @property
    def keys(self) -> int:
        """Width of the keys, and of the values."""
        return self.key_heads * self.head_width

    @property
    def table(self) -> int:
        """Numbers of the embedding."""
        return self.vocabulary * self.hidden

    @property
    def weights(self) -> float:
        """Bytes of the parameters: trained ones float32, frozen ones as they are loaded."""
        return (HALF if self.low and self.adapted else SINGLE) * self.frozen + SINGLE * self.trained

    @property
    def moments(self) -> float:
        """Bytes of AdamW's two moments."""
        return 2.0 * SINGLE * self.trained

    @property
    def gradients(self) -> float:
        return float(SINGLE * self.trained)

    @property
    def casts(self) -> float:
        """Bytes of the bfloat16 copies that autocast keeps of trained weights, for one context of it."""
        if not self.low:
            return 0.0
        looked_up = self.table if self.embedding_trained and not self.tied else 0
        return float(HALF * (self.trained - looked_up))

    @property
    def kept_casts(self) -> float:
        """Those that outlive the layer that needs them, where rows are scored: the usual block's do not."""
        return 0.0 if self.usual else self.casts


@dataclass(frozen=True)
class Batch:
    """Sequences that go through a network together. A prompt's tokens are there once for all of its rows.

    >>> Batch(prompts=2, rows=8, prompt_tokens=10, completion_tokens=5).tokens
    60
    """

    prompts: int
    rows: int
    prompt_tokens: int
    completion_tokens: int

    @property
    def tokens(self) -> int:
        return self.prompts * self.prompt_tokens + self.scored

    @property
    def scored(self) -> int:
        """Positions projected onto the vocabulary."""
        return self.rows * self.completion_tokens

    @property
    def branches(self) -> int:
        """Rows that share their prompt with another row."""
        return self.rows if self.rows > self.prompts and self.prompt_tokens else 0

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.completion_tokens


# -- counting --------------------------------------------------------------------------------------------------------


def policy_network(config: ModelConfig, model_config: Any) -> Network:
    """The network of a `policy:` block over a transformers config. Raises ConfigError for a mixture of experts."""
    from transformers import AutoModelForCausalLM

    model = _on_meta(AutoModelForCausalLM, model_config, config.model)
    size = sum(parameter.numel() for parameter in model.parameters())
    low = resolve_precision(config.precision, size) == "bfloat16"
    adapted = config.lora is not None or is_adapter(config.model)
    if adapted:
        model = _adapted(model, config)
    return _network(model, model_config, low=low, adapted=adapted, checkpointing=config.gradient_checkpointing)


def reward_network(model_config: Any, labels: int, *, precision: str, checkpointing: bool = False) -> Network:
    """A reward model: float32 weights, all of them trained."""
    from transformers import AutoModelForSequenceClassification

    model_config.num_labels = labels
    model = _on_meta(AutoModelForSequenceClassification, model_config, str(model_config.name_or_path))
    size = sum(parameter.numel() for parameter in model.parameters())
    low = resolve_precision(precision, size) == "bfloat16"
    return _network(model, model_config, low=low, adapted=False, checkpointing=checkpointing)


def critic_network(network: Network) -> Network:
    """A copy of a policy with a value head: its vocabulary projection stays where it is, untrained."""
    if not network.head_trained or network.tied:
        return replace(network, head_trained=False)
    table = network.table
    return replace(network, head_trained=False, trained=network.trained - table, frozen=network.frozen + table)


def _on_meta(auto_class: Any, model_config: Any, name: str) -> Any:
    text = model_config.get_text_config()
    if (getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None) or 1) > 1:
        raise ConfigError(f"{name}: a mixture of experts; `plan` knows dense transformers only")
    try:
        with torch.device("meta"):
            return auto_class.from_config(model_config)
    except ValueError as error:
        raise ConfigError(
            f"{name}: a {model_config.model_type} model cannot be loaded as {auto_class.__name__}; "
            "give a model of that kind"
        ) from error


def _adapted(model: Any, config: ModelConfig) -> Any:
    import peft

    from equipoise.models.loading import quiet_peft

    if config.lora is None:
        settings = peft.PeftConfig.from_pretrained(config.model)
    else:
        settings = peft.LoraConfig(r=config.lora.r, target_modules=config.lora.target_modules, task_type="CAUSAL_LM")
    try:
        with quiet_peft(), torch.device("meta"):
            return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(
            f"policy.lora: LoRA matches no module of {type(model).__name__}; use `all-linear` or names from the model "
            f"({str(error).strip().splitlines()[0]})"
        ) from error


def _network(model: Any, model_config: Any, *, low: bool, adapted: bool, checkpointing: bool) -> Network:
    text = model_config.get_text_config()
    base = model.get_base_model() if adapted else model
    embedding, head = base.get_input_embeddings().weight, _head_weight(base)
    parameters = list(model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    layers = int(text.num_hidden_layers)
    heads = int(text.num_attention_heads)
    apart, shared, ranks = _inputs(base, {id(embedding), id(head)})
    wide = int(getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * text.hidden_size)
    return Network(
        layers=layers,
        hidden=int(text.hidden_size),
        heads=heads,
        key_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_width=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        feed_forward=wide,
        vocabulary=len(embedding),
        gated=any(name.endswith(("gate_proj", "gate_up_proj")) for name, _ in base.named_modules()),
        frozen=sum(p.numel() for p in parameters) - trained,
        trained=trained,
        embedding_trained=embedding.requires_grad,
        head_trained=head is not None and head.requires_grad,
        tied=head is embedding,
        linear=sum(weight.numel() for weight in linear_weights(base)),
        inputs_apart=apart / layers,
        inputs_shared=shared / layers,
        ranks=ranks / layers,
        low=low,
        adapted=adapted,
        checkpointing=checkpointing,
        head_norms=any(name.endswith("q_norm") for name, _ in base.named_modules()),
        usual=_is_usual(base),
        flops=_flop_counter(base, head),
    )


def _is_usual(base: Any) -> bool:
    try:
        block_specs(base, torch.float32)
    except (NotPlain, *UNFIT):
        return False
    return True


def _head_weight(base: Any) -> nn.Parameter | None:
    head = base.get_output_embeddings()
    return None if head is None else head.weight


def _flop_counter(base: Any, head: Any) -> FlopCounter:
    """Of a language model; of a reward model as `RewardModel.forward_flops` has it."""
    if head is not None:
        return FlopCounter.of(SimpleNamespace(causal=base, packs=True))  # type: ignore[arg-type]  # all it looks at
    text = base.config.get_text_config()
    tables = {id(part.weight) for part in base.modules() if isinstance(part, nn.Embedding)}
    products = sum(p.numel() for p in base.parameters() if p.ndim >= 2 and id(p) not in tables)
    return FlopCounter(2.0 * products, 4.0 * text.hidden_size * text.num_hidden_layers, 0.0, True, False)


def _inputs(base: Any, tables: set[int]) -> tuple[float, float, float]:
    """Over all layers: widths of the inputs autograd keeps, one for each matrix; shared ones once; adapters' ranks.

    The matrices of an attention or feed-forward block read what the block reads, all but its last one.
    """
    blocks: dict[str, list[tuple[int, bool]]] = {}
    ranks = 0
    for name, weight, rank in _matrices(base, tables):
        blocks.setdefault(name.rpartition(".")[0], []).append((weight.shape[1], rank > 0 or weight.requires_grad))
        ranks += rank
    apart = sum(width for block in blocks.values() for width, kept in block if kept)
    shared = 0
    for block in blocks.values():
        *first, (last_width, last_kept) = block
        shared += max((width for width, kept in first if kept), default=0) + last_width * last_kept
    return apart, shared, ranks


def _matrices(base: Any, tables: set[int]) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Name, weight and the adapter's rank (0: none) of every matrix inside the layers."""
    for name, module in base.named_modules():
        weight = getattr(module, "weight", None)
        if "lora_" in name or not isinstance(weight, torch.Tensor) or weight.ndim != 2 or id(weight) in tables:
            continue
        if re.search(r"\.\d+\.", name) and not name.endswith(".base_layer"):
            adapters = getattr(module, "lora_A", None)
            yield name, weight, sum(part.weight.shape[0] for part in adapters.values()) if adapters else 0


# -- what a pass needs -----------------------------------------------------------------------------------------------


def layer_activations(net: Network, batch: Batch, *, on_gpu: bool = False) -> float:
    """Bytes that autograd keeps of one layer of these sequences, packed, on a CPU with their filler.

    - the inputs of both norms in float32; where the norm is trained, the normalised ones too;
    - the input of every trained or adapted matrix: under bfloat16 a copy for each, in float32 shared between those that
      read the same; the adapters' inner values;
    - queries, keys, values and result of attention, a number per head; each row that shares a prompt has a copy of its
      keys and values, or, of a long prompt on a CPU (`shared_attention`), none and two more numbers per head; on a CPU
      in float32, else in the product's type, then with a copy of the mask under bfloat16;
    - of a gated feed-forward layer its two products and the activation's result.

    The usual block on a CPU keeps less: the residual stream before attention and before the feed-forward layer, a
    number per norm, attention's result in the product's type, and the two products of the feed-forward layer.

    on_gpu: attention has no fused kernel for a mask with grouped heads there, and keeps its weights in float32.
    """
    item, tokens = net.product, batch.tokens if on_gpu else filled_up(batch.tokens)
    norms = 2 * SINGLE * net.hidden * (1 if net.adapted else 2)
    inputs = HALF * net.inputs_apart if net.low else SINGLE * net.inputs_shared
    seen = item if on_gpu else SINGLE
    copies = bool(batch.branches) and not _apart(batch, on_gpu)
    looked_at = batch.prompts * batch.prompt_tokens + batch.branches * batch.length if copies else tokens
    attention = seen * 2 * (net.queries * tokens + net.keys * looked_at) + SINGLE * net.heads * tokens
    feed_forward = item * net.feed_forward * (3 if net.gated else 1)
    kept = attention + tokens * (norms + inputs + item * net.ranks + feed_forward)
    if net.usual:
        stream = 2 * (net.residual * net.hidden + SINGLE)
        stream += net.head_norms * (item * (net.queries + net.keys) + SINGLE * (net.heads + net.key_heads))
        kept = attention + tokens * (stream + item * (net.queries + 2 * net.feed_forward + net.ranks))
    if _apart(batch, on_gpu):
        kept += SINGLE * net.heads * (tokens + batch.scored)
        if not net.low:  # attention's result is kept once, for its own gradient and as the next matrix's input
            kept -= SINGLE * net.queries * tokens
    if net.low and on_gpu:
        kept += HALF * batch.branches * batch.completion_tokens * batch.length
    if on_gpu and net.heads != net.key_heads:
        kept += SINGLE * batch.branches * batch.length * (net.heads * batch.completion_tokens + 2 * net.queries)
    return kept


def _apart(batch: Batch, on_gpu: bool) -> bool:
    """Whether rows attend to their prompts apart from themselves."""
    return bool(batch.branches) and not on_gpu and batch.prompt_tokens >= LONG_PROMPT


def activations(net: Network, batch: Batch, *, on_gpu: bool = False) -> float:
    """Bytes that autograd keeps of a pass, the vocabulary projection's left out.

    With gradient checkpointing the inputs of all layers and one layer's activations.
    """
    layer = layer_activations(net, batch, on_gpu=on_gpu)
    stream = float(net.residual * net.hidden * batch.tokens)
    mask = 0.0 if _apart(batch, on_gpu) else SINGLE * batch.branches * batch.completion_tokens * batch.length
    layers = net.layers * stream + layer if net.checkpointing else net.layers * layer
    last_norm = SINGLE * net.hidden * batch.tokens * (1 if net.adapted else 2)
    return layers + mask + last_norm + stream


def working_set(net: Network, tokens: float, *, adapters: bool = True) -> float:
    """Bytes of one layer at work on so many tokens, forward or backward: its feed-forward part is the widest.

    Three buffers of width I; adapters under bfloat16 read their input in float32 and again in bfloat16 instead. The
    usual block's backward pass has six: the activation, its product, gradients of that and of both halves, and what one
    matrix product lays out.
    """
    buffers = SINGLE + 2 * HALF if net.low and net.adapted and adapters else 3 * net.product
    if net.usual:
        buffers = 6 * net.product
    return tokens * (buffers * net.feed_forward + (2 * net.residual + SINGLE) * net.hidden)


def chunk_numbers(net: Network, positions: float) -> float:
    """Logits that exist at once in the vocabulary projection."""
    chunk = min(PROJECTION_CHUNK, max(64, PROJECTION_NUMBERS // net.vocabulary))
    return float(min(chunk, positions) * net.vocabulary)


def _projection(net: Network, positions: float, on_gpu: bool) -> tuple[float, float]:
    """Bytes of the projection's buffers in the forward and in the backward pass: a chunk of products, and, of a block
    of it, what the softmax needs besides; on a GPU the block is the chunk."""
    numbers = chunk_numbers(net, positions)
    block = numbers if on_gpu else min(numbers, float(cached_rows(net.vocabulary) * net.vocabulary))
    wide = SINGLE * block if net.low else 0.0  # in float32 products and logits are one memory
    kept = float(net.product * net.hidden * positions)
    cast = HALF * net.table if net.low and net.head_trained else 0
    forward = kept + cast + numbers * net.product + wide + SINGLE * block
    if not net.head_trained:
        return forward, kept
    gradient = SINGLE * net.table + (HALF * net.table if net.low else 0)
    return forward, kept + cast + gradient + numbers * net.product + wide


def update_terms(net: Network, batch: Batch, passes: int, *, projects: bool = True, on_gpu: bool = False) -> Terms:
    """Bytes on top of weights and moments at the fullest moment of an update of `passes` micro-batches.

    Either the backward pass begins, with all activations, or it ends, with all gradients. Gradients of the first
    micro-batch grow while activations go.
    """
    kept = activations(net, batch, on_gpu=on_gpu)
    forward, backward = _projection(net, batch.scored, on_gpu) if projects else (0.0, 0.0)
    earlier = net.gradients if passes > 1 else 0.0
    working = working_set(net, batch.tokens)
    begins: Terms = {
        "gradients": earlier,
        "activations": kept + max(0.0, working - max(forward, backward)),
        "logits": max(forward, backward),
        "bfloat16 copies": net.kept_casts,
    }
    tables = net.embedding_trained * SINGLE * net.table * (1 + (net.tied and projects and passes > 1))
    first_layer = layer_activations(net, batch, on_gpu=on_gpu)
    ends: Terms = {"gradients": net.gradients + tables, "activations": first_layer + working, "logits": 0.0}
    ends["bfloat16 copies"] = 0.0
    return max(begins, ends, key=lambda terms: sum(terms.values()))


def scoring_terms(
    net: Network, batch: Batch, *, adapters: bool = True, projects: bool = True, on_gpu: bool = False
) -> Terms:
    """Bytes on top of weights and moments of a pass without gradients."""
    forward = _projection(net, batch.scored, on_gpu)[0] if projects else 0.0
    stream = 2.0 * net.residual * net.hidden * batch.tokens
    return {
        "activations": stream + max(0.0, working_set(net, batch.tokens, adapters=adapters) - forward),
        "logits": forward,
        "bfloat16 copies": net.kept_casts,
    }


def sampling_terms(net: Network, batch: Batch) -> Terms:
    """Bytes on top of weights and moments while these rows are sampled together: prefill, or the last token.

    Keys and values of every layer, a prompt's once; float32 logits, divided by the temperature, and as weights. On a
    CPU the usual block has keys and values in float32 and a copy of all weights that is laid out for few rows.
    """
    pair = net.layers * net.keys * (net.product + (net.residual if net.low else SINGLE))  # a key and a value
    if net.usual:
        pair = net.layers * net.keys * 2 * SINGLE
    looked_up = 0 if net.tied else net.table  # the embedding alone is not multiplied by
    laid_out = float(net.product * (net.frozen + net.trained - looked_up))
    copies: Terms = {"weights laid out": laid_out} if net.usual and laid_out <= most_copied() else {}
    prompts = float(pair * batch.prompts * batch.prompt_tokens)
    prefill = working_set(net, batch.prompts * batch.prompt_tokens)
    tables = (3.0 * SINGLE + HALF * net.low) * batch.rows * net.vocabulary
    scores = batch.rows * net.heads * batch.length * (3 * net.product + SINGLE)
    prefilling: Terms = {"cache": prompts, "activations": prefill, "logits": 0.0}
    decoding: Terms = {
        "cache": prompts + pair * batch.scored,
        "activations": max(0.0, scores + working_set(net, batch.rows) - tables),
        "logits": tables,
    }
    return {**max(prefilling, decoding, key=lambda terms: sum(terms.values())), **copies, "bfloat16 copies": net.casts}


def model_config_of(file: Path) -> Any:
    """The transformers config in a config.json. Raises ConfigError for what is none."""
    import json

    from transformers import AutoConfig

    file = file / "config.json" if file.is_dir() else file
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{file}: not a model's config.json ({type(error).__name__}: {error}); give the file of a model that "
            "transformers knows, with its model_type"
        ) from error
