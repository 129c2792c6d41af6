"""`equipoise plan`: whether a recipe fits, what takes the memory, how long a step takes, and what to change."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from equipoise.config import AnyRecipe, RewardConfig, load_recipe
from equipoise.errors import ConfigError
from equipoise.evaluation.tables import TextTable, show
from equipoise.studies.planning import GB, USABLE, Configs, Lengths, Need, need_of
from equipoise.studies.planning_changes import Change, changes, together
from equipoise.studies.planning_time import Machine, measured_machine, seconds

SHOWN_CHANGES = 8


@dataclass(frozen=True)
class PlanOptions:
    """What the command line says."""

    memory: float | None  # GB of a GPU; None: this machine's
    configs: tuple[str, ...]  # FILE or NAME=FILE
    lengths: Lengths
    flops: float | None
    bandwidth: float | None
    as_json: bool


def plan_command(recipe: Path, overrides: Sequence[str], options: PlanOptions) -> None:
    """Print the plan of a recipe. Raises ConfigError for a recipe or config that cannot be read."""
    config = load_recipe(recipe, list(overrides))
    result = plan(config, options)
    if options.as_json:
        print(json.dumps({"recipe": str(recipe), "overrides": list(overrides), **result}, indent=2))
        return
    show_plan(result)


def plan(config: AnyRecipe, options: PlanOptions) -> dict[str, Any]:
    """The plan as plain JSON types; memory in GB of 10^9 bytes, times in seconds."""
    configs = Configs(_files(config, options.configs))
    memory, on_gpu = _memory(options.memory)
    limit = USABLE * memory

    def need_with(changed: AnyRecipe) -> Need:
        return need_of(changed, configs, options.lengths, on_gpu=on_gpu)

    need = need_with(config)
    fits = need.peak <= limit
    found = [] if fits else changes(config, need_with)
    combined = None if fits else together(config, found, need_with, limit)
    machine = _machine(need, options)
    return {
        "algorithm": config.algorithm,
        "memory_gb": memory / GB,
        "usable_gb": limit / GB,
        "device": "gpu" if on_gpu else "machine",
        "peak_gb": need.peak / GB,
        "peak_phase": need.peak_phase,
        "fits": fits,
        "phases_gb": {name: need.total(name) / GB for name in need.phases},
        "terms_gb": {name: {term: v / GB for term, v in need.terms(name).items()} for name in need.phases},
        "changes": [_change(change, limit) for change in found],
        "together": None if combined is None else _change(combined, limit),
        "seconds": seconds(need, machine),
        "flops_per_second": machine.flops,
        "bytes_per_second": machine.bandwidth,
        "measured_here": options.flops is None or options.bandwidth is None,
        "not_counted": list(need.unknown),
    }


def _change(change: Change, limit: float) -> dict[str, Any]:
    return {
        "overrides": list(change.overrides),
        "peak_gb": change.peak / GB,
        "fits": change.peak <= limit,
        "same_result": change.same_result,
    }


def _files(config: AnyRecipe, given: Sequence[str]) -> dict[str, Path]:
    """Config files by model name; one without a name is the trained model's."""
    name = config.model.model if isinstance(config, RewardConfig) else config.policy.model
    files: dict[str, Path] = {}
    for text in given:
        key, equals, file = text.rpartition("=")
        path = Path(file)
        if not path.exists():
            raise ConfigError(f"--config {text}: no such file; give a model's config.json, as FILE or NAME=FILE")
        files[key if equals else name] = path
    return files


def _memory(given: float | None) -> tuple[float, bool]:
    """Bytes, and whether they are a GPU's."""
    if given is not None:
        return given * GB, True
    if torch.cuda.is_available():
        return float(torch.cuda.mem_get_info()[1]), True
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")), False


def _machine(need: Need, options: PlanOptions) -> Machine:
    if options.flops is not None and options.bandwidth is not None:
        return Machine(options.flops, options.bandwidth)
    low = next(iter(need.passes.values()))[0].network.low
    measured = measured_machine(low)
    return Machine(options.flops or measured.flops, options.bandwidth or measured.bandwidth)


# -- for people ------------------------------------------------------------------------------------------------------


def show_plan(result: dict[str, Any]) -> None:
    """The plan as tables."""
    where = f"a GPU of {result['memory_gb']:.4g} GB" if result["device"] == "gpu" else "this machine"
    verdict = "fits" if result["fits"] else "does not fit"
    print(
        f"{result['algorithm']}: {verdict} {where}: needs {result['peak_gb']:.3g} GB in its fullest phase, "
        f"{result['peak_phase']}; {result['usable_gb']:.3g} of {result['memory_gb']:.3g} GB can be used"
    )
    for name in result["not_counted"]:
        print(f"not counted: {name}")
    print()
    show(_memory_table(result))
    if result["changes"]:
        print()
        show(_changes_table(result))
    print()
    show(_time_table(result))


def _memory_table(result: dict[str, Any]) -> TextTable:
    phases = sorted(result["phases_gb"], key=lambda name: -result["phases_gb"][name])
    names = list(dict.fromkeys(term for phase in phases for term in result["terms_gb"][phase]))
    rows = [(name, *(_gb(result["terms_gb"][phase].get(name)) for phase in phases)) for name in names]
    rows.append(("total", *(_gb(result["phases_gb"][phase]) for phase in phases)))
    return TextTable("Memory by phase, GB (10^9 bytes)", ("term", *phases), tuple(rows))


def _gb(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _changes_table(result: dict[str, Any]) -> TextTable:
    changed = [*result["changes"][:SHOWN_CHANGES], *([result["together"]] if result["together"] else [])]
    rows = [
        (
            " ".join(change["overrides"]),
            _gb(change["peak_gb"]),
            "yes" if change["fits"] else "no",
            "yes" if change["same_result"] else "no",
        )
        for change in changed
    ]
    header = ("change (last: as few together as fit)", "GB", "fits", "same result")
    return TextTable("What to change, the greatest effect first", header, tuple(rows))


def _time_table(result: dict[str, Any]) -> TextTable:
    rows = [(name, f"{value:.3g}") for name, value in result["seconds"].items()]
    # The plan may be for a GPU and run where there is none.
    source = "measured on this machine, --flops and --bandwidth name another's; " if result["measured_here"] else ""
    title = (
        f"A step at least, at {result['flops_per_second']:.3g} FLOP/s and {result['bytes_per_second']:.3g} bytes/s "
        f"({source}a real one is slower: norms, activations and sampling are not counted)"
    )
    return TextTable(title, ("phase", "seconds"), tuple(rows))
