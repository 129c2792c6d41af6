"""Recipes: frozen schemas, YAML, overrides. Importing this package imports no torch."""

from equipoise.config.loading import apply_override, changed_keys, load_recipe, recipe_from_mapping, resolved
from equipoise.config.recipes import (
    RECIPES,
    AnyRecipe,
    BackboneConfig,
    CombineConfig,
    GRPOConfig,
    InputFormatConfig,
    RewardConfig,
    SFTConfig,
)
from equipoise.config.schema import (
    AspectConfig,
    CheckpointConfig,
    DataConfig,
    InLoopEvaluationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    SamplingConfig,
    Schema,
    ScorerConfig,
)

__all__ = [
    "RECIPES",
    "AnyRecipe",
    "AspectConfig",
    "BackboneConfig",
    "CheckpointConfig",
    "CombineConfig",
    "DataConfig",
    "GRPOConfig",
    "InLoopEvaluationConfig",
    "InputFormatConfig",
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Recipe",
    "RewardConfig",
    "SFTConfig",
    "SamplingConfig",
    "Schema",
    "ScorerConfig",
    "apply_override",
    "changed_keys",
    "load_recipe",
    "recipe_from_mapping",
    "resolved",
]
