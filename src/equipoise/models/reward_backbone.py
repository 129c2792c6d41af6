"""The network under the reward heads: loading it with K outputs, a pad token and an input format it can take."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from equipoise.config import BackboneConfig
from equipoise.data import load_tokenizer
from equipoise.errors import ConfigError
from equipoise.models.loading import _first_line, enable_checkpointing, load_config, with_builtin
from equipoise.models.reward_head import check_padding, find_head, usable_positions
from equipoise.models.reward_inputs import InputFormat, RewardInputs
from equipoise.models.reward_members import Members, wide_head

logger = logging.getLogger(__name__)

PAD_TOKEN = "<|pad|>"


@dataclass
class Backbone:
    """A sequence-classification model with K outputs, checked, and the encoder of its inputs.

    With `num_members` above 0 the head has that many times K outputs, a member's K after another's.
    """

    model: Any
    inputs: RewardInputs
    head_name: str
    head: nn.Linear
    num_members: int = 0

    def install(self, members: Members) -> None:
        """Put these members in the place of the head."""
        self.head = wide_head(members)
        self.num_members = len(members["weight"])
        self.model.set_submodule(self.head_name, self.head)

    @property
    def head_std(self) -> float:
        """Standard deviation of a fresh head's weights."""
        return float(getattr(self.model.config.get_text_config(), "initializer_range", None) or 0.02)


def new_backbone(
    config: BackboneConfig, names: list[str], input_format: InputFormat, seed: int, *, keep_head: bool = False
) -> Backbone:
    """The backbone a recipe names, with a fresh head: weights ~ N(0, initializer_range), bias 0, from `seed`.

    A head that the checkpoint carries was trained for other outputs and is kept only where `keep_head` says so.
    `max_length` is lowered to what the backbone's positions allow. Raises ConfigError for a model that cannot be a
    reward model.
    """
    options: dict[str, Any] = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    config = with_builtin(config)
    model_config = load_config(config.model, **options)
    _set_outputs(model_config, names)
    if config.dropout is not None:
        set_dropout(model_config, config.dropout)
    tokenizer = load_tokenizer(config.model, **options)
    _set_pad_token(tokenizer, model_config, config.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random = config.initialise == "random"
        model = _load(config.model, model_config, random=random, complete=keep_head, **options)
        if tokenizer.pad_token_id >= model.get_input_embeddings().weight.shape[0]:
            model = _with_pad_row(model, tokenizer, config.model)
        inputs = reward_inputs(tokenizer, model, input_format, config.model)
        probe = inputs.collate(inputs.rows(["a", "a a"], ["a", "a"]))
        head_name, head = find_head(model, probe, config.model)
        check_padding(model, probe, tokenizer.pad_token_id, config.model)
        backbone = Backbone(model, inputs, head_name, head)
        if not keep_head:
            nn.init.normal_(head.weight, std=backbone.head_std)
            if head.bias is not None:
                nn.init.zeros_(head.bias)
    inputs.truncation = type(inputs.truncation)()
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    return backbone


def saved_backbone(directory: str, input_format: InputFormat) -> Backbone:
    """A backbone that `RewardModel.save` wrote, head included. Raises ConfigError where anything is missing."""
    model_config = load_config(directory)
    tokenizer = load_tokenizer(directory)
    model = _load(directory, model_config, random=False, complete=True)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id != model_config.get_text_config().pad_token_id:
        raise ConfigError(
            f"{directory}: pad_token_id is {model_config.get_text_config().pad_token_id} in config.json and "
            f"{tokenizer.pad_token_id} in the tokenizer; both must be the same id: save the reward model again"
        )
    inputs = reward_inputs(tokenizer, model, input_format, directory)
    probe = inputs.collate(inputs.rows(["a", "a a"], ["a", "a"]))
    head_name, head = find_head(model, probe, directory)
    inputs.truncation = type(inputs.truncation)()
    return Backbone(model, inputs, head_name, head)


def reward_inputs(tokenizer: Any, model: Any, input_format: InputFormat, source: str) -> RewardInputs:
    """The encoder of inputs for this model, `max_length` lowered to its positions."""
    limit = usable_positions(model, model.config)
    if limit is not None and limit < input_format.max_length:
        logger.warning(
            "%s: input.max_length %d is more than its %d positions; using %d",
            source,
            input_format.max_length,
            limit,
            limit,
        )
        input_format = replace(input_format, max_length=limit)
    # Segment ids only where the network has segments: GPT-2, for one, would look them up in its word embeddings.
    has_segments = (getattr(model.config, "type_vocab_size", 0) or 0) > 1
    return RewardInputs(tokenizer, input_format, use_token_types=has_segments)


def set_dropout(config: Any, rate: float) -> list[str]:
    """Set every dropout rate of a config in place; returns the names set. Rates that are null follow another one."""
    text = config.get_text_config()
    names = [
        name
        for name, value in text.to_dict().items()
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, int | float) and type(value) is not bool
    ]
    for name in names:
        setattr(text, name, rate)
    return names


def _set_outputs(config: Any, names: list[str]) -> None:
    config.id2label = dict(enumerate(names))
    config.label2id = {name: k for k, name in enumerate(names)}
    config.num_labels = len(names)
    if list(config.id2label.values()) != names:  # some configs reset the labels when the number changes
        config.id2label = dict(enumerate(names))
        config.label2id = {name: k for k, name in enumerate(names)}
    config.problem_type = "regression"
    if hasattr(config, "use_cache"):
        config.use_cache = False


def _load(
    name: str,
    config: Any,
    *,
    random: bool,
    complete: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Any:
    from transformers import AutoModelForSequenceClassification

    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{name}: unsupported backbone for a reward model: {config.model_type} is an encoder-decoder, it pools at "
            "EOS and fails where truncation removed it; take an encoder like BERT or a decoder like Llama"
        )
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        if random:
            return AutoModelForSequenceClassification.from_config(config, **options).float()
        with quiet_transformers():
            model, report = AutoModelForSequenceClassification.from_pretrained(
                name,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=not complete,
                output_loading_info=True,
                revision=revision,
                **options,
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        if "Unrecognized configuration class" in str(error):
            raise ConfigError(
                f"{name}: unsupported backbone for a reward model: transformers has no sequence-classification class "
                f"for {config.model_type!r}; take an encoder like BERT or a decoder like Llama"
            ) from error
        raise ConfigError(f"{name}: cannot load the model: {_first_line(error)}") from error
    base = f"{model.base_model_prefix}."
    missing = sorted(
        key for key in report["missing_keys"] if complete or (key.startswith(base) and "pooler" not in key)
    )
    if missing:
        raise ConfigError(
            f"{name}: {len(missing)} weights are not in the checkpoint ({', '.join(missing[:3])}, ...); "
            f"it was not saved from a {type(model).__name__}"
        )
    return model


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars, and no report of missing head weights: they are always missing here, and always set."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _set_pad_token(tokenizer: Any, config: Any, source: str) -> None:
    """Give tokenizer and config one pad id, apart from EOS, adding a token where there is none.

    Decoders find the token they pool at as the last one whose id is not the pad id; were EOS the pad, the EOS that
    ends every input would be skipped. The config has it before the model is built: RoBERTa counts positions from it.
    """
    text_config = config.get_text_config()
    if len(tokenizer) > text_config.vocab_size:
        raise ConfigError(
            f"{source}: its tokenizer has {len(tokenizer)} tokens and the model {text_config.vocab_size} embeddings; "
            "give a directory whose tokenizer belongs to the model"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id < text_config.vocab_size:
        config.pad_token_id = text_config.pad_token_id = tokenizer.pad_token_id


def _with_pad_row(model: Any, tokenizer: Any, source: str) -> Any:
    """The model with an embedding for an added pad token.

    It is built again from the changed config, so that whatever it derives from the pad id (RoBERTa its positions,
    embeddings the row without gradient) is what a model loaded from disk derives.
    """
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    try:
        rebuilt = type(model)(model.config)
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            f"{source}: its tokenizer has no pad token, and {type(model).__name__} cannot take an added one "
            f"(id {tokenizer.pad_token_id}): {_first_line(error)}; give a tokenizer with a pad token"
        ) from error
    rebuilt.load_state_dict(model.state_dict())
    return rebuilt
