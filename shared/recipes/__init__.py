"""Recipes: one YAML file describes a whole experiment; the YAML files that come with the package lie here too.

recipe = load_recipe("phantom", overrides=["loss.kd_ratio=1.0", "run.name=soft"])
"""

from shared.recipes.recipe import (
    Recipe,
    baseline_of,
    dump_recipe,
    load_recipe,
    recipe_text,
    settings_of_baseline,
    trainer_of,
)
from shared.recipes.sections import (
    CacheConfig,
    ColumnsConfig,
    DataConfig,
    FreezeConfig,
    LoraConfig,
    LossConfig,
    MixedCache,
    OptimizationConfig,
    ParallelConfig,
    PositionsConfig,
    RoundsConfig,
    RunConfig,
    SmallModelConfig,
    SmallModelsConfig,
    Split,
    SplitsConfig,
    StudentConfig,
    TeacherConfig,
    WriteConfig,
)

__all__ = [
    "CacheConfig",
    "ColumnsConfig",
    "DataConfig",
    "FreezeConfig",
    "LoraConfig",
    "LossConfig",
    "MixedCache",
    "OptimizationConfig",
    "ParallelConfig",
    "PositionsConfig",
    "Recipe",
    "RoundsConfig",
    "RunConfig",
    "SmallModelConfig",
    "SmallModelsConfig",
    "Split",
    "SplitsConfig",
    "StudentConfig",
    "TeacherConfig",
    "WriteConfig",
    "baseline_of",
    "dump_recipe",
    "load_recipe",
    "recipe_text",
    "settings_of_baseline",
    "trainer_of",
]
