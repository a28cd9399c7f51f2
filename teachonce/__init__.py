"""The parts of teachonce that a program of one's own uses; docs/library.md shows them at work.

``import teachonce`` costs nothing: a name's module, and PyTorch with it, is imported when the name is first
used.  The names live in ``shared``, where their documentation is; what is not listed here may change.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shared.cache import CacheList, CacheMix, CacheReader, TeacherIdentity, open_caches
    from shared.capture.loop import capture, capture_examples, text_inputs
    from shared.data.collation import Encoded
    from shared.data.conversations import Turn
    from shared.data.processing import open_processor
    from shared.data.rows import Example, open_split
    from shared.errors import CacheFormatError, CacheMismatchError, DataError, RecipeError, TeachonceError
    from shared.kd_loss import Divergence, KDLoss, LossSums, fused_ce_kd
    from shared.models.weights import weight_fingerprint
    from shared.recipes import DataConfig, load_recipe
    from shared.recipes.policies import Random, Threshold, TopK, TopP
    from shared.sparse import MixedTargets, SparseTargets, position_seeds, sparsify

    __version__: str

_HOMES = {
    "shared.cache": ("CacheList", "CacheMix", "CacheReader", "TeacherIdentity", "open_caches"),
    "shared.capture.loop": ("capture", "capture_examples", "text_inputs"),
    "shared.data.collation": ("Encoded",),
    "shared.data.conversations": ("Turn",),
    "shared.data.processing": ("open_processor",),
    "shared.data.rows": ("Example", "open_split"),
    "shared.errors": ("CacheFormatError", "CacheMismatchError", "DataError", "RecipeError", "TeachonceError"),
    "shared.kd_loss": ("Divergence", "KDLoss", "LossSums", "fused_ce_kd"),
    "shared.models.weights": ("weight_fingerprint",),
    "shared.recipes": ("DataConfig", "load_recipe"),
    "shared.recipes.policies": ("Random", "Threshold", "TopK", "TopP"),
    "shared.sparse": ("MixedTargets", "SparseTargets", "position_seeds", "sparsify"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022  (as docs/library.md lists them)
    "CacheReader",
    "CacheList",
    "CacheMix",
    "open_caches",
    "SparseTargets",
    "MixedTargets",
    "KDLoss",
    "fused_ce_kd",
    "LossSums",
    "Divergence",
    "load_recipe",
    "DataConfig",
    "open_split",
    "open_processor",
    "Example",
    "Turn",
    "Encoded",
    "capture",
    "capture_examples",
    "TeacherIdentity",
    "text_inputs",
    "weight_fingerprint",
    "sparsify",
    "position_seeds",
    "Threshold",
    "TopK",
    "TopP",
    "Random",
    "TeachonceError",
    "RecipeError",
    "DataError",
    "CacheFormatError",
    "CacheMismatchError",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = importlib.import_module("importlib.metadata").version("teachonce")
    elif name in _HOME_OF:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    else:
        raise AttributeError(f"module 'teachonce' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
