"""The multi-label reward regression model: one network, one named output per aspect."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from equipoise.config import BackboneConfig, InputFormatConfig
from equipoise.data import save_tokenizer_checked
from equipoise.errors import CheckpointError, ConfigError, RewardError
from equipoise.models.aspects import Aspect
from equipoise.models.decoder_blocks import BlockSpec, specs_here
from equipoise.models.loading import check_model_directory, default_device, resolve_precision
from equipoise.models.packed_attention import longest_packed
from equipoise.models.packed_rewards import packed_logits, packing_fault
from equipoise.models.policy_module import UNFIT
from equipoise.models.products import NotPlain
from equipoise.models.reward_backbone import Backbone, new_backbone, quiet_transformers, saved_backbone
from equipoise.models.reward_head import folded_head
from equipoise.models.reward_inputs import (
    EncodedRow,
    InputFormat,
    Prompt,
    TruncationCount,
    length_batches,
    prompt_batches,
)
from equipoise.models.reward_members import (
    fresh_members,
    mean_and_std,
    mean_head,
    read_members,
    split_heads,
    write_members,
)

logger = logging.getLogger(__name__)

REWARD_MODEL_FILE = "equipoise.json"
FORMAT_VERSION = 1


class RewardModule(nn.Module):
    """What `accelerator.prepare` wraps: encoded batch in, standardised predictions [B, K] out (float32); [B, M, K] of
    a model with M members.

    Standardised means in units of each aspect's training std, from its training mean. A fresh network is trained to
    answer in these units; a saved one answers in native units, which `scale` and `shift` undo.

    A decoder of the usual block computes packed rows, where a probe shows that this gives the same outputs;
    `packs = False` goes through the model's own forward.
    """

    scale_K: Tensor
    shift_K: Tensor

    def __init__(self, model: Any, precision: str, num_members: int = 0) -> None:
        super().__init__()
        self.model = model
        self.precision = precision
        self.num_members = num_members
        num_labels = model.config.num_labels
        self.register_buffer("scale_K", torch.ones(num_labels), persistent=False)
        self.register_buffer("shift_K", torch.zeros(num_labels), persistent=False)
        fault = packing_fault(model)
        self.packs = fault is None
        if fault is not None:
            logger.info("%s: rows are padded, not packed: %s", type(model).__name__, fault)

    def logits(self, shared: Sequence[int] | None = None, /, **batch: Tensor) -> Tensor:
        """The network's own outputs [B, K], float32; [B, M, K] with members.

        `shared`: how many first tokens of each row may be those of another; such are then computed once.
        """
        device_type = batch["input_ids"].device.type
        with torch.autocast(device_type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            blocks = self.blocks_for(batch["input_ids"].shape[1])
            if blocks is None:
                logits = self.model(**batch).logits
            else:
                logits = packed_logits(self.model, blocks, batch["input_ids"], batch["attention_mask"], shared or 0)
        logits = logits.float()
        return logits.unflatten(1, (self.num_members, -1)) if self.num_members else logits

    def blocks_for(self, longest: int) -> list[BlockSpec] | None:
        """What packed rows of up to so many tokens go through; None where they must be padded."""
        if not self.packs or longest > longest_packed(self.model.config) or self.scale_K.device.type != "cpu":
            return None
        try:
            return specs_here(self.model)
        except (NotPlain, *UNFIT) as error:  # a model may change after it was tried: hooks of a wrapper, for one
            self.packs = False
            logger.warning("%s: rows are padded from now on, not packed: %s", type(self.model).__name__, error)
            return None

    def forward(self, **batch: Tensor) -> Tensor:
        """Standardised predictions [B, K] of a batch from `RewardModel.encode`."""
        return self.logits(**batch) * self.scale_K + self.shift_K


class RewardModel:
    """Scores responses on K named aspects, in the units people scored them in.

    `native = logits * native_scale + native_offset`: a network in training has its aspects' std and mean there; a
    loaded one has 1 and the stored `offset`, because saving folds the scaling into the last linear layer.

    A model with M members has M heads on one backbone: a score is the mean of their outputs, and `with_std` says by
    how much they disagree. The head is linear, so that mean is what the saved, averaged head computes.

    Attributes:
        module: the network (`RewardModule`), float32 weights.
        aspect_specs: the aspects, in the order of the outputs.
        inputs: the encoder of prompts and responses; `inputs.truncation` counts what did not fit.
        source: directory or hub name, for messages.
        scored_flops: FLOPs that scoring has cost so far: with the padding of its batches, shared prompts once.
    """

    def __init__(
        self,
        backbone: Backbone,
        aspects: Sequence[Aspect],
        *,
        native_scale: Sequence[float] | None = None,
        native_offset: Sequence[float] | None = None,
        precision: str = "float32",
        source: str = "reward model",
    ) -> None:
        self._backbone = backbone
        self.aspect_specs = list(aspects)
        self.inputs = backbone.inputs
        self.tokenizer = backbone.inputs.tokenizer
        self.source = source
        size = sum(parameter.numel() for parameter in backbone.model.parameters())
        self.module = RewardModule(backbone.model, resolve_precision(precision, size), backbone.num_members)
        self.native_scale = list(native_scale) if native_scale else [aspect.std for aspect in aspects]
        self.native_offset = list(native_offset) if native_offset else [aspect.mean for aspect in aspects]
        self.scored_flops = 0.0
        self._set_standardisation()
        self.module.eval()

    @classmethod
    def from_backbone(
        cls,
        config: BackboneConfig,
        aspects: Sequence[Aspect],
        input_format: InputFormatConfig | InputFormat | None = None,
        seed: int = 0,
        member_seeds: Sequence[int] = (),
    ) -> RewardModel:
        """A new reward model with one fresh output per aspect, to be trained; in evaluation mode until then.

        A directory saved by `RewardModel.save` with the same aspects in the same order keeps its outputs, so that
        training can go on from it; any other checkpoint contributes the network under the outputs only.

        Args:
            config: the `model:` block of a reward recipe.
            aspects: names, directions, and the mean and std of the training labels.
            input_format: the `input:` block; `pair` with 512 tokens by default.
            seed: of the weights that the checkpoint does not give.
            member_seeds: one for each member of an ensemble of heads, two at least, of its initial weights; a saved
                model with as many members keeps those. Empty: one head.

        Raises ConfigError naming the model and the mend: nothing there, no sequence-classification class, an
        encoder-decoder, outputs that change with padding, more tokens than embeddings, nothing fits the context, a
        single member.
        """
        _check_names(aspects)
        if len(member_seeds) == 1:
            raise ConfigError("an ensemble needs at least two members; one has nothing to disagree with")
        layout = _input_format(input_format)
        names = [aspect.name for aspect in aspects]
        earlier = _earlier_reward_model(Path(config.model))
        continues = config.initialise == "pretrained" and list(earlier.get("aspects", {})) == names
        if member_seeds and earlier.get("members") != len(member_seeds):
            continues = False  # one head, or another number of them: nothing to start each member from
        backbone = new_backbone(config, names, layout, seed, keep_head=continues)
        if member_seeds:
            backbone.install(
                read_members(Path(config.model), names, len(member_seeds), backbone.head)
                if continues
                else fresh_members(backbone.head, member_seeds, backbone.head_std)
            )
        scale = [1.0] * len(names) if continues else None
        offset = [float(value) for value in earlier["offset"]] if continues else None
        return cls(
            backbone,
            aspects,
            native_scale=scale,
            native_offset=offset,
            precision=config.precision,
            source=config.model,
        )

    @classmethod
    def load(
        cls, directory: str | Path, *, device: torch.device | str | None = None, precision: str = "float32"
    ) -> RewardModel:
        """A reward model that `save` wrote, in evaluation mode.

        Args:
            directory: with config.json, safetensors weights, tokenizer and equipoise.json.
            device: where it computes; the GPU if there is one, else the CPU.
            precision: of the forward pass. float32 scores as plain `transformers` does; bfloat16 is faster and exact
                to about 1% of an aspect's std.

        Raises ConfigError where the directory is missing, is not a reward model, or contradicts itself,
        CheckpointError where its members (ensemble.safetensors) are missing, broken or another model's.
        """
        path = Path(directory)
        check_model_directory(str(path))
        if not path.is_dir():
            raise ConfigError(f"{path}: no such reward model directory")
        values = _stored(path)
        aspects = [Aspect.from_json(name, entry) for name, entry in values["aspects"].items()]
        names = [aspect.name for aspect in aspects]
        layout = InputFormat.from_json(values["input_format"], str(path / REWARD_MODEL_FILE))
        backbone = saved_backbone(str(path), layout)
        labels = [backbone.model.config.id2label[k] for k in range(backbone.model.config.num_labels)]
        if labels != names:
            raise ConfigError(
                f"{path}: config.json names the outputs {labels} and {REWARD_MODEL_FILE} names the aspects {names}; "
                "the two files do not belong together, save the reward model again"
            )
        if values.get("members"):
            backbone.install(read_members(path, names, values["members"], backbone.head))
        model = cls(
            backbone,
            aspects,
            native_scale=[1.0] * len(names),
            native_offset=[float(value) for value in values["offset"]],
            precision=precision,
            source=str(path),
        )
        model.module.to(device if device is not None else default_device())
        return model

    @property
    def aspects(self) -> list[str]:
        """Aspect names, in the order of the columns of `score`."""
        return [aspect.name for aspect in self.aspect_specs]

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next(self.module.parameters()).device

    @property
    def truncation(self) -> TruncationCount:
        """What did not fit since the model was made or loaded."""
        return self.inputs.truncation

    def encode(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> dict[str, Tensor]:
        """The batch that the network takes: int64 [B, longest] `input_ids`, `attention_mask` and, where it has
        segments, `token_type_ids`; right-padded. Raises DataError where the two lists differ in length.
        """
        return self.inputs.collate(self.inputs.rows(prompts, responses))

    @property
    def num_members(self) -> int:
        """Members of the ensemble of heads, 0 for a model with one head."""
        return self.module.num_members

    @overload
    def score(
        self,
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        *,
        batch_size: int = ...,
        with_std: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, batch_size: int = ..., with_std: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, batch_size: int = 32, with_std: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predicted scores [B, K], float32 on the CPU, in native units, columns as in `aspects`.

        Rows of similar length, or of the same prompt where rows are packed, share a batch, which holds no more tokens
        than `batch_size` rows of the longest have; the result is in the order given and does not depend on the batching
        beyond rounding. With members the scores are their mean, and `with_std` adds their unbiased (M - 1) standard
        deviation, [B, K]: the pair (mean, std).

        Raises RewardError naming aspect and row for a prediction that is not finite, ConfigError for `with_std` of a
        model without members.
        """
        rows = self.inputs.rows(prompts, responses)
        if with_std:
            return self.score_rows_with_std(rows, batch_size=batch_size)
        return self.score_rows(rows, batch_size=batch_size)

    def score_rows(self, rows: Sequence[EncodedRow], *, batch_size: int = 32) -> Tensor:
        """`score` of rows already encoded by `inputs.rows`."""
        if self.num_members:
            return self.score_rows_with_std(rows, batch_size=batch_size)[0]
        return self._outputs(rows, batch_size)

    def score_rows_with_std(self, rows: Sequence[EncodedRow], *, batch_size: int = 32) -> tuple[Tensor, Tensor]:
        """`score` with `with_std` of rows already encoded by `inputs.rows`."""
        if not self.num_members:
            raise ConfigError(
                f"{self.source}: has one head, so nothing says how sure it is; train it with `ensemble: {{members: 4}}`"
                ", or take several models with RewardEnsemble.load"
            )
        return mean_and_std(self._outputs(rows, batch_size))

    def _outputs(self, rows: Sequence[EncodedRow], batch_size: int) -> Tensor:
        """Native outputs of the rows, in their order: [B, K], [B, M, K] with members."""
        shape = (self.num_members, len(self.aspect_specs)) if self.num_members else (len(self.aspect_specs),)
        scores = torch.empty(len(rows), *shape)
        scale_K = torch.tensor(self.native_scale, device=self.device)
        offset_K = torch.tensor(self.native_offset, device=self.device)
        lengths = [len(row.ids) for row in rows]
        executed = 0.0
        was_training = self.module.training
        self.module.eval()
        try:
            with torch.no_grad():
                longest = max(lengths, default=0)
                packed = self.module.blocks_for(longest) is not None
                tokens = batch_size * longest
                for indices in prompt_batches(rows, tokens) if packed else length_batches(lengths, tokens):
                    parts = [rows[index] for index in indices]
                    batch = {name: tensor.to(self.device) for name, tensor in self.inputs.collate(parts).items()}
                    logits = self.module.logits([row.shared for row in parts], **batch)
                    executed += self._executed_flops(parts, packed)
                    scores[indices] = (logits * scale_K + offset_K).cpu()
        finally:
            self.module.train(was_training)
        self._check_finite(scores)
        self.scored_flops += executed
        return scores

    def _executed_flops(self, rows: Sequence[EncodedRow], packed: bool) -> float:
        """FLOPs of a batch as it is computed: padded to its longest row, or packed with equal prompts once."""
        if not packed:
            return len(rows) * self._row_flops(max(len(row.ids) for row in rows))
        again = Counter(tuple(row.ids[: row.shared]) for row in rows)
        return self.forward_flops(rows) - sum(
            (count - 1) * self._row_flops(len(prompt)) for prompt, count in again.items()
        )

    def forward_flops(self, rows: Sequence[EncodedRow]) -> float:
        """FLOPs of a forward pass over these rows, a multiplication and an addition each as one; padding not counted.

        Two for each weight of a matrix and token (embeddings are look-ups), four times width and layers for each pair
        of tokens. Example: 10 tokens in one row, 1000 weights, 2 layers of width 8: 20,000 + 64 * 100 = 26,400.
        """
        return sum(self._row_flops(len(row.ids)) for row in rows)

    def _row_flops(self, length: int) -> float:
        weights, per_pair = self._flop_counts
        return 2.0 * weights * length + per_pair * length**2

    @cached_property
    def _flop_counts(self) -> tuple[int, float]:
        """Weights that a token is multiplied with, and FLOPs of a pair of tokens over all layers."""
        model, text = self.module.model, self.module.model.config.get_text_config()
        tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        weights = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in tables)
        return weights, 4.0 * (getattr(text, "hidden_size", 0) or 0) * (getattr(text, "num_hidden_layers", 0) or 0)

    def save(self, directory: str | Path) -> Path:
        """Write a plain transformers directory plus equipoise.json, whole or not at all; an earlier one is replaced.

        Raises CheckpointError where the disk refuses, ConfigError where the saved tokenizer does not reload.
        """
        target = Path(directory)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            self._write(temporary)
            _replace_directory(temporary, target)
        except OSError as error:
            raise CheckpointError(
                f"{target}: cannot save the reward model: {error}; what was there before is untouched"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return target

    def _write(self, directory: Path) -> None:
        model, name, members = self._backbone.model, self._backbone.head_name, self.num_members
        copies = members or 1
        head, offset = folded_head(name, self._backbone.head, self.native_scale * copies, self.native_offset * copies)
        if members:
            heads = split_heads(head, members)
            write_members(directory, heads, self.aspects)
            head = {f"{name}.{last}": tensor for last, tensor in mean_head(heads).items()}
        state = {**model.state_dict(), **head}
        with quiet_transformers():
            model.save_pretrained(directory, state_dict=state)
        save_tokenizer_checked(self.tokenizer, directory)
        values = {
            "format_version": FORMAT_VERSION,
            "kind": "reward_model",
            "aspects": {aspect.name: aspect.to_json() for aspect in self.aspect_specs},
            "offset": offset[: len(self.aspect_specs)],
            "input_format": self.inputs.format.to_json(),
            **({"members": members} if members else {}),
        }
        (directory / REWARD_MODEL_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def _set_standardisation(self) -> None:
        """`standardised = (native - mean) / std`, in float64 before it is rounded: exactly 1 and 0 in training."""
        triples = zip(self.aspect_specs, self.native_scale, self.native_offset, strict=True)
        pairs = [(scale / aspect.std, (offset - aspect.mean) / aspect.std) for aspect, scale, offset in triples]
        self.module.scale_K.copy_(torch.tensor([scale for scale, _ in pairs]))
        self.module.shift_K.copy_(torch.tensor([shift for _, shift in pairs]))

    def _check_finite(self, scores: Tensor) -> None:
        broken = (~torch.isfinite(scores)).nonzero()
        if len(broken):
            place = broken[0].tolist()
            row, k = place[0], place[-1]
            raise RewardError(
                f"{self.source}: the score of aspect {self.aspects[k]!r} in row {row} is {float(scores[tuple(place)])} "
                f"({len(broken)} such scores); the model's weights or its training are broken"
            )


def _input_format(value: InputFormatConfig | InputFormat | None) -> InputFormat:
    if value is None:
        return InputFormat()
    if isinstance(value, InputFormat):
        return value
    return InputFormat(value.format, value.separator, value.max_length)


def _check_names(aspects: Sequence[Aspect]) -> None:
    names = [aspect.name for aspect in aspects]
    if not names:
        raise ConfigError("a reward model needs at least one aspect")
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"aspects are named twice: {', '.join(repeated)}; names must differ")
    for aspect in aspects:
        if not (math.isfinite(aspect.mean) and math.isfinite(aspect.std) and aspect.std > 0):
            raise ConfigError(f"aspect {aspect.name!r}: mean {aspect.mean}, std {aspect.std}; std must be above 0")


def _earlier_reward_model(directory: Path) -> dict[str, Any]:
    """equipoise.json of a reward model to go on from; nothing for any other checkpoint.

    A policy of ours keeps its prompt format, and how it is asked, in a file of the same name.
    """
    path = directory / REWARD_MODEL_FILE
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); save the model again") from error
    return {} if isinstance(values, dict) and "prompt_format" in values else _stored(directory)


def _stored(directory: Path) -> dict[str, Any]:
    """equipoise.json of a reward model, with the fields that loading needs checked."""
    path = directory / REWARD_MODEL_FILE
    if not path.is_file():
        raise ConfigError(
            f"{directory}: not a reward model, it has no {REWARD_MODEL_FILE}; give the directory that reward training "
            "wrote (RUN/model)"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); save the reward model again") from error
    missing = [
        key for key in ("aspects", "offset", "input_format") if not isinstance(values, dict) or key not in values
    ]
    if missing:
        raise ConfigError(f"{directory}: not a reward model, {REWARD_MODEL_FILE} has no {', '.join(missing)}")
    if not isinstance(values["aspects"], Mapping) or not values["aspects"]:
        raise ConfigError(f"{path}: `aspects` is {values['aspects']!r}; expected a mapping of names")
    offset = values["offset"]
    if not isinstance(offset, list) or len(offset) != len(values["aspects"]):
        raise ConfigError(f"{path}: `offset` is {offset!r}; expected {len(values['aspects'])} numbers, one per aspect")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in offset):
        raise ConfigError(f"{path}: `offset` is {offset!r}; expected finite numbers")
    members = values.get("members")
    if members is not None and (type(members) is not int or members < 2):
        raise ConfigError(f"{path}: `members` is {members!r}; expected a whole number of at least 2, or no such key")
    for name, entry in values["aspects"].items():
        if not isinstance(entry, Mapping) or "higher_is_better" not in entry:
            raise ConfigError(f"{path}: aspect {name!r} has no `higher_is_better`")
    return values


def _replace_directory(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`; an existing target is moved aside first and removed last."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    if target.exists():
        os.replace(target, aside)
    try:
        os.replace(temporary, target)
    except OSError:
        if aside.exists():
            os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)
