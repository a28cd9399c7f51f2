"""Opens a model's Hugging Face processor so that it works alike with and without torchvision.

    processor = load_processor("Qwen/Qwen3.5-4B", max_pixels=512 * 512)

Otherwise torchvision decides which image processor is taken (the PIL one and the torchvision one differ in
the last bits of a resize), whether processors that also know videos can be built at all, and, up to
transformers 5.17 at least, whether ``AutoImageProcessor`` opens anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer, Qwen3VLProcessor
from transformers.models.auto.image_processing_auto import get_image_processor_config
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from shared.errors import RecipeError, shortened
from shared.models.adapters import lineage
from shared.places import is_local, require_hub_asked_once, require_no_typo, why


class Qwen3VLProcessorWithoutVideo(Qwen3VLProcessor):
    """The processor of Qwen3-VL and Qwen3.5 for pictures and text."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=chat_template)


def load_processor(
    model: str,
    *,
    revision: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Any:
    """The processor of a local folder or a Hub model, its pictures bounded to that many pixels if asked for.

    Raises   RecipeError  when it cannot be opened, takes no pictures, or knows no such bounds.
    """
    (model, revision), *adapters = lineage(model, revision)
    asked = {"min_pixels": min_pixels, "max_pixels": max_pixels}
    bounds = {name: value for name, value in asked.items() if value is not None}
    if min_pixels is not None and max_pixels is not None and min_pixels > max_pixels:
        raise RecipeError(f"data.min_pixels {min_pixels} is above data.max_pixels {max_pixels}")
    require_no_typo(model, what=f"model {model}", error=RecipeError)
    if not is_local(model):
        require_hub_asked_once()
    try:
        images = _pil_image_processor(model, revision, bounds)
        processor = _processor(model, revision, images)
    except Exception as error:  # missing files, missing packages, no network: of many types
        reason = shortened(why(model, error))
        raise RecipeError(f"model {model}: its processor cannot be opened: {reason}") from error
    for adapter, _ in adapters:
        _take_texts(processor, Path(adapter))
    if not hasattr(processor, "tokenizer"):
        raise RecipeError(f"model {model}: {type(processor).__name__} takes no text; a VLM is needed")
    if bounds and not bounds.keys() <= getattr(images.valid_kwargs, "__annotations__", {}).keys():
        raise RecipeError(
            f"model {model}: {type(images).__name__} has no such setting as {' or '.join(bounds)}; "
            "remove it from the recipe's data section"
        )
    return processor


def _take_texts(processor: Any, adapter: Path) -> None:
    """Tokenizer and template of an adapter's folder, where it has some of its own, in place of what it was built on.

    An export of a student that began from an adapter has the same ones.
    """
    try:
        if any((adapter / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
            processor.tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=False)
            processor.chat_template = processor.tokenizer.chat_template or processor.chat_template
        if (template := adapter / "chat_template.jinja").exists():
            processor.chat_template = template.read_text(encoding="utf-8")
    except Exception as error:  # of many types, as above
        reason = shortened(why(str(adapter), error))
        raise RecipeError(f"model {adapter}: its tokenizer cannot be opened: {reason}") from error


def chat_template(processor: Any) -> str:
    """The template that makes prompts, the processor's own or else its tokenizer's.

    Raises   RecipeError  when there is none.
    """
    found = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(found, dict):  # several, by name
        found = found.get("default")
    if not found:
        raise RecipeError(f"{processor.tokenizer.name_or_path} has no chat template; it makes the prompts")
    return found


def _pil_image_processor(model: str, revision: str | None, bounds: dict[str, int]) -> Any:
    """The PIL form of the image processor, by name: ``...ImageProcessor`` or ``...Fast`` or ``...Pil``."""
    name = str(get_image_processor_config(model, revision=revision).get("image_processor_type"))
    found = getattr(transformers, name.removesuffix("Fast").removesuffix("Pil") + "Pil", None)
    if found is None:
        return AutoImageProcessor.from_pretrained(
            model, revision=revision, backend="pil", trust_remote_code=False, **bounds
        )
    return found.from_pretrained(model, revision=revision, **bounds)


def _processor(model: str, revision: str | None, images: Any) -> Any:
    """The whole, with ``images`` in it."""
    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    if PROCESSOR_MAPPING.get(type(config), None) is Qwen3VLProcessor:
        settings, _ = Qwen3VLProcessor.get_processor_dict(model, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=False)
        template = settings.get("chat_template") or tokenizer.chat_template
        return Qwen3VLProcessorWithoutVideo(images, tokenizer, chat_template=template)
    processor = AutoProcessor.from_pretrained(model, revision=revision, trust_remote_code=False)
    processor.image_processor = images
    return processor
