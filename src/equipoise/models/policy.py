"""A policy: a causal language model with its tokenizer, ready to sample, to score completions and to be trained."""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from equipoise.config import LoraConfig, ModelConfig
from equipoise.data import PromptFormat, load_tokenizer, save_tokenizer_checked
from equipoise.errors import CheckpointError, ConfigError
from equipoise.models.loading import (
    build_model,
    check_model_directory,
    count_parameters,
    default_device,
    enable_checkpointing,
    is_adapter,
    load_config,
    quiet_peft,
    resolve_precision,
    with_builtin,
    without_dropout,
)
from equipoise.models.policy_module import PolicyModule
from equipoise.models.preference import CONDITIONED, Preference, read_preference
from equipoise.models.reference import AdapterOff, FrozenAdapter, FrozenModel, Reference
from equipoise.models.sharding import gathered_state

logger = logging.getLogger(__name__)

POLICY_FILE = "equipoise.json"


@dataclass
class Policy:
    """What `load_policy` returns.

    `module` is the network itself; `wrapped` is what a gradient step goes through, the same object until
    `accelerator.prepare` has wrapped it.
    """

    module: PolicyModule
    tokenizer: Any
    name: str
    precision: str  # "float32" or "bfloat16"
    prompt_format: PromptFormat  # "chat" or "text", resolved
    eos_ids: tuple[int, ...]  # every id that ends a completion
    pad_id: int  # fills arrays; masks, not this id, say what is padding
    reference: Reference | None = None
    version: int = 0  # optimizer steps taken
    wrapped: nn.Module | None = None
    preference: Preference | None = None  # how it is asked, where it was trained to read weights in its prompt
    _config_changes: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""
        return next(self.module.parameters()).device

    @property
    def is_lora(self) -> bool:
        """True where adapters are trained and the base is frozen."""
        return hasattr(self.module.model, "peft_config")

    @property
    def context_length(self) -> int | None:
        """Most positions the model can attend to, None where its config sets no limit."""
        text = self.module.causal.config.get_text_config()
        limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
        return int(limit) if limit else None

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding, at least the tokenizer's ids."""
        return int(self.module.causal.get_input_embeddings().weight.shape[0])

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters an optimizer updates, in a fixed order."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def saver(self) -> Callable[[Path], Path]:
        """`save` for one process to call; sharded weights are gathered now, by every process together."""
        state = gathered_state(self.module)
        if state is None:
            return self.save
        model_state = {name.removeprefix("model."): t for name, t in state.items() if name.startswith("model.")}
        return lambda directory: self.save(directory, state=model_state)

    def save(self, directory: str | Path, *, state: dict[str, torch.Tensor] | None = None) -> Path:
        """Write a plain transformers (or PEFT adapter) directory with tokenizer, atomically.

        `state` replaces the model's own weights. The directory appears whole or not at all. Raises ConfigError if the
        saved tokenizer does not reload, CheckpointError if the disk does not take it; what was there before stays then.
        """
        target = Path(directory)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir(parents=True)
            self._write(temporary, state)
            replace_directory(target, temporary)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{target}: could not save the policy: {error}; free space or choose another"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    def _write(self, directory: Path, state: dict[str, torch.Tensor] | None) -> None:
        weights = {} if state is None else {"state_dict": state}
        text_config = self.module.causal.config.get_text_config()
        try:
            for name, value in self._config_changes.items():
                setattr(text_config, name, value)
            self.module.model.save_pretrained(directory, safe_serialization=True, **weights)  # type: ignore[operator]
        finally:
            for name in self._config_changes:
                setattr(text_config, name, 0.0)
        save_tokenizer_checked(self.tokenizer, directory)
        conditioned = {} if self.preference is None else {CONDITIONED: self.preference.to_json()}
        (directory / POLICY_FILE).write_text(json.dumps({"prompt_format": self.prompt_format} | conditioned) + "\n")


def replace_directory(target: Path, new: Path) -> None:
    """Put `new` in the place of `target`; the old one goes only when the new one is there."""
    old = target.with_name(f".{target.name}.{os.getpid()}.old.tmp")
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def load_policy(
    source: str | Path | ModelConfig,
    *,
    trainable: bool = False,
    with_reference: bool = False,
    value_head: bool = False,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Policy:
    """Load any causal LM that transformers loads, as full model, fresh LoRA or continued adapter.

    Args:
        source: a hub name, a directory, or the `policy:` block of a recipe.
        trainable: prepare parameters for training (float32 where trained); otherwise everything is frozen.
        with_reference: keep what `policy.reference` needs: the base under the adapter, a copy of a continued
            adapter, or a copy of the model.
        value_head: add a scalar head (for PPO).
        seed: of randomly initialised weights (LoRA, `initialise: random`).
        device: where it computes; the GPU if there is one, else the CPU.

    Raises ConfigError naming the directory and the mend.
    """
    config = source if isinstance(source, ModelConfig) else ModelConfig(model=str(source))
    name, config = config.model, with_builtin(config)
    if name != config.model and config.lora is not None:
        raise ConfigError(f"policy.lora: {name} has random weights; train it with `sft` first, then adapt the result")
    check_model_directory(config.model)
    continues_adapter = is_adapter(config.model)
    if continues_adapter and config.lora is not None:
        raise ConfigError(f"policy.lora: {config.model} is an adapter with its own LoRA settings; remove `policy.lora`")
    base_name = adapter_base(config.model) if continues_adapter else config.model
    options = {"revision": config.revision, "trust_remote_code": config.trust_remote_code}
    model_config = load_config(base_name, **options)
    changes = without_dropout(model_config)
    tokenizer = load_tokenizer(tokenizer_source(config.model, base_name), **options)
    uses_lora = continues_adapter or config.lora is not None

    from transformers import AutoModelForCausalLM

    size = count_parameters(AutoModelForCausalLM, model_config, trust_remote_code=config.trust_remote_code)
    precision = resolve_precision(config.precision, size)
    frozen_low = precision == "bfloat16" and (uses_lora or not trainable)
    model = build_model(
        AutoModelForCausalLM,
        base_name,
        model_config,
        initialise=config.initialise,
        dtype=torch.bfloat16 if frozen_low else torch.float32,
        seed=seed,
        **options,
    )
    _check_vocabulary(base_name, model, tokenizer)
    if uses_lora:
        with warnings.catch_warnings():
            # peft asks transformers for a name that transformers has deprecated: nothing a user could do about it.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = _with_adapter(model, config, base_name, continues_adapter, seed, trainable)
    if not trainable:
        model.requires_grad_(False)
    if config.gradient_checkpointing and trainable:
        enable_checkpointing(model)
    module = PolicyModule(model, autocast=precision == "bfloat16", value_head=value_head)
    module.to(device if device is not None else default_device())
    module.train(trainable)
    eos_ids = _eos_ids(module.causal, tokenizer, config.model)
    policy = Policy(
        module=module,
        tokenizer=tokenizer,
        name=name,
        precision=precision,
        prompt_format=_resolve_prompt_format(config, tokenizer),
        eos_ids=eos_ids,
        pad_id=next(id_ for id_ in (tokenizer.pad_token_id, *eos_ids, 0) if id_ is not None),
        preference=read_preference(Path(config.model) / POLICY_FILE),
        _config_changes=changes,
    )
    if with_reference:
        policy.reference = make_reference(policy, continues_adapter=continues_adapter)
    return policy


def make_reference(policy: Policy, *, continues_adapter: bool = False) -> Reference:
    """The policy as it is now, frozen, in the cheapest form that is exact."""
    if not policy.is_lora:
        return FrozenModel(policy.module)
    return FrozenAdapter(policy.module) if continues_adapter else AdapterOff(policy.module)


def adapter_base(directory: str) -> str:
    """The base model an adapter directory names; a relative path is tried from the adapter's own directory too."""
    file = Path(directory) / "adapter_config.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file}: broken JSON: {error}; save the adapter again with save_pretrained") from error
    base = values.get("base_model_name_or_path")
    if not base:
        raise ConfigError(f"{directory}/adapter_config.json: base_model_name_or_path is missing; add the base model")
    beside = Path(directory) / base
    return str(beside) if not Path(base).exists() and beside.exists() else base


def tokenizer_source(directory: str, base: str) -> str:
    """An adapter saved without a tokenizer uses its base's."""
    has_own = (Path(directory) / "tokenizer_config.json").is_file() or not is_adapter(directory)
    return directory if has_own else base


def _check_vocabulary(name: str, model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= rows:
        raise ConfigError(
            f"{name}: vocabulary mismatch: the tokenizer has ids up to {highest}, the model embeds {rows}; "
            "use the tokenizer the base model was trained with, or resize and save the base first"
        )


def _with_adapter(model: Any, config: ModelConfig, base_name: str, continues: bool, seed: int, trainable: bool) -> Any:
    """A fresh LoRA adapter, or the saved one, on the frozen base; adapter weights are float32."""
    import peft

    if continues:
        try:
            with quiet_peft():
                adapted = peft.PeftModel.from_pretrained(model, config.model, is_trainable=trainable)
        except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
            raise ConfigError(
                f"{config.model}: the adapter does not fit its base {base_name}: {str(error).strip().splitlines()[0]}; "
                "check base_model_name_or_path in adapter_config.json"
            ) from error
    else:
        assert config.lora is not None
        adapted = _fresh_adapter(model, config.lora, seed)
    if Path(base_name).exists():
        # An absolute path, so that the saved adapter loads from any working directory.
        adapted.peft_config["default"].base_model_name_or_path = str(Path(base_name).resolve())
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def _fresh_adapter(model: Any, lora: LoraConfig, seed: int) -> Any:
    import peft

    settings = peft.LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,  # dropout would make the ratio of two passes noise
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        with torch.random.fork_rng(devices=[]), quiet_peft():
            torch.manual_seed(seed)
            return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(
            f"policy.lora.target_modules {lora.target_modules!r}: LoRA matches no module of {type(model).__name__}; "
            f"use `all-linear` or names from the model ({str(error).strip().splitlines()[0]})"
        ) from error


def _resolve_prompt_format(config: ModelConfig, tokenizer: Any) -> PromptFormat:
    """`auto`: what the policy was saved with, else chat where the tokenizer has a template."""
    if config.prompt_format != "auto":
        return config.prompt_format
    saved = Path(config.model) / POLICY_FILE
    if saved.is_file():
        found = json.loads(saved.read_text(encoding="utf-8")).get("prompt_format")
        if found in ("chat", "text"):
            return found
    return "chat" if tokenizer.chat_template else "text"


def _eos_ids(causal: Any, tokenizer: Any, name: str) -> tuple[int, ...]:
    """Every id of generation_config.eos_token_id, and the tokenizer's own."""
    configured = getattr(causal.generation_config, "eos_token_id", None)
    ids = [configured] if isinstance(configured, int) else list(configured or [])
    if tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        logger.warning("%s has no EOS token: every completion runs to max_tokens", name)
    return tuple(dict.fromkeys(ids))
