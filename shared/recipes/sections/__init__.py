"""The sections of a recipe, each a frozen pydantic model; each part of the program is built from its own."""

from shared.recipes.sections.bootstrap import (
    BootstrapConfig,
    PhantomConfig,
    SmallModelConfig,
    SmallModelsConfig,
)
from shared.recipes.sections.data import ColumnsConfig, DataConfig, SplitsConfig, WriteConfig
from shared.recipes.sections.running import EvaluationConfig, ParallelConfig, RoundsConfig, RunConfig
from shared.recipes.sections.student import (
    FreezeConfig,
    LoraConfig,
    LossConfig,
    OptimizationConfig,
    PositionsConfig,
    StudentConfig,
)
from shared.recipes.sections.teaching import CacheConfig, MixedCache, TeacherConfig
from shared.recipes.sections.types import Split

__all__ = [
    "BootstrapConfig",
    "CacheConfig",
    "ColumnsConfig",
    "DataConfig",
    "EvaluationConfig",
    "FreezeConfig",
    "LoraConfig",
    "LossConfig",
    "MixedCache",
    "OptimizationConfig",
    "ParallelConfig",
    "PhantomConfig",
    "PositionsConfig",
    "RoundsConfig",
    "RunConfig",
    "SmallModelConfig",
    "SmallModelsConfig",
    "Split",
    "SplitsConfig",
    "StudentConfig",
    "TeacherConfig",
    "WriteConfig",
]
