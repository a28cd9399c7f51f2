"""What a tokenizer, a chat template and an image processor do, as hashes of content.

Two of them are equal exactly when their fingerprints are, whatever their files are called and however often
they were saved: names, padding, truncation and the class behind a setting are left out.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from transformers import PreTrainedTokenizerBase

_ADDED_TOKEN_FIELDS = (
    "id",
    "content",
    "single_word",
    "lstrip",
    "rstrip",
    "normalized",
)  # how a text is split
_BESIDE_THE_PIXELS = {
    "image_processor_type",  # the family is kept, see below
    "feature_extractor_type",
    "processor_class",
    "auto_map",
    "return_tensors",
    "device",
    "disable_grouping",
    "data_format",
    "input_data_format",
}


def digest(content: Any) -> str:
    """SHA-256, in hex, of plain content; dictionaries count as unordered."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=_plain)
    return sha256_hex(text.encode("utf-8", "surrogatepass"))


def sha256_hex(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of everything that decides which ids a text gets: vocabulary, merges, normalizer, added tokens."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    model = content["model"]
    if "merges" in model:  # written as "a b" or as ["a", "b"], depending on the release
        model["merges"] = [m.split(" ") if isinstance(m, str) else list(m) for m in model["merges"]]
    added = [{field: token[field] for field in _ADDED_TOKEN_FIELDS} for token in content["added_tokens"]]
    return digest(
        {
            "model": model,
            "added_tokens": sorted(added, key=lambda token: token["id"]),
            "normalizer": content["normalizer"],
            "pre_tokenizer": content["pre_tokenizer"],
            "post_processor": content["post_processor"],
        }
    )


def template_fingerprint(template: str) -> str:
    """Of the template's text."""
    return digest(template)


def image_processor_fingerprint(processor: Any, **conversion: Any) -> str:
    """Of the settings that decide pixels and placeholders, and of how pictures become RGB, ``conversion``."""
    settings = processor.image_processor.to_dict()
    family = str(settings.get("image_processor_type")).removesuffix("Fast").removesuffix("Pil")
    outer = {k: v for k, v in processor.to_dict().items() if isinstance(v, str | int | float)}
    return digest(
        {
            "family": family,
            "settings": _without(settings, _BESIDE_THE_PIXELS),
            "placeholders": _without(outer, {"processor_class", "chat_template", "auto_map"}),
            "conversion": conversion,
        }
    )


def _without(settings: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k not in names and v is not None}


def _plain(value: Any) -> Any:
    """Enumerations and size objects as they are saved."""
    if hasattr(value, "value"):
        return value.value
    return {k: v for k, v in dict(value).items() if v is not None}
