"""Opens a model's Hugging Face processor so that it works alike with and without torchvision.

    processor = load_processor("Qwen/Qwen3.5-4B", max_pixels=512 * 512)

Otherwise torchvision decides which image processor is taken (the PIL one and the torchvision one differ in
the last bits of a resize), whether processors that also know videos can be built at all, and, up to
transformers 5.17 at least, whether ``AutoImageProcessor`` opens anything.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import transformers
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SmolVLMProcessor,
)
from transformers.models.auto.image_processing_auto import get_image_processor_config
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.models.smolvlm import processing_smolvlm as smolvlm
from transformers.utils import is_torchvision_available

from shared.errors import RecipeError, shortened
from shared.models.adapters import lineage
from shared.places import is_local, require_hub_asked_once, require_no_typo, why
from shared.regular_files import read_regular

# Of families whose models were trained without turns, and have no template of their own.
PLAIN_TEMPLATES = {
    "PaliGemmaProcessor": (  # pictures first; the processor writes what begins a text and the line's end behind it
        "{% for message in messages if message.role == 'user' %}{% for part in message.content "
        "if part.type == 'image' %}<image>{% endfor %}{% endfor %}"
        "{% for message in messages %}{% if message.role == 'assistant' and not loop.last %}"
        "{{ raise_exception('PaliGemma answers one question; it knows no conversations') }}{% endif %}"
        "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}"
        "{{ {'system': '\n', 'assistant': eos_token}.get(message.role, '') }}{% endfor %}"
    )
}


def load_processor(
    model: str,
    *,
    revision: str | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    template: str | None = None,
) -> Any:
    """The processor of a local folder or a Hub model, its pictures bounded to that many pixels if asked for.

    template  a file with the chat template to be used, instead of the model's own

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
        images = _image_processor(model, revision, bounds)
        processor_class, arguments = _arguments(model, revision, images)
        for adapter, _ in adapters:
            arguments |= _texts_of(Path(adapter), type(arguments["tokenizer"]))
        processor = _built(processor_class, arguments)
    except RecipeError:
        raise
    except Exception as error:  # missing files, missing packages, no network: of many types
        if _needs_torchvision(error):
            raise RecipeError(
                f"model {model}: its processor needs torchvision, which is not installed. "
                "Run `pip install 'teachonce[vision]'`, or take a model of another family"
            ) from error
        reason = shortened(why(model, error))
        raise RecipeError(f"model {model}: its processor cannot be opened: {reason}") from error
    if not hasattr(processor, "tokenizer"):
        raise RecipeError(f"model {model}: {type(processor).__name__} takes no text; a VLM is needed")
    if not processor.tokenizer.get_vocab().keys() - processor.tokenizer.get_added_vocab().keys():
        raise RecipeError(
            f"model {model}: it has no tokenizer, or an empty one. Fetch its files again, tokenizer.json among them"
        )
    if template is not None:
        processor.chat_template = read_template(template)
    if bounds and not bounds.keys() <= getattr(images.valid_kwargs, "__annotations__", {}).keys():
        raise RecipeError(
            f"model {model}: {type(images).__name__} has no such setting as {' or '.join(bounds)}; "
            "remove it from the recipe's data section"
        )
    return processor


def read_template(path: str) -> str:
    """Raises   RecipeError  when there is no such text file"""
    try:
        return read_regular(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"data.chat_template {path}: cannot be read: {error}") from error


def _texts_of(adapter: Path, tokenizer_class: Any) -> dict[str, Any]:
    """Tokenizer and template of an adapter's folder, where it has some of its own, in place of what it was built on.

    An export of a student that began from an adapter has the same ones.  The class is the base model's: without a
    configuration beside it, the same file would be read by other rules.
    """
    found: dict[str, Any] = {}
    try:
        if any((adapter / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
            found["tokenizer"] = tokenizer_class.from_pretrained(adapter, trust_remote_code=False)
            if found["tokenizer"].chat_template:
                found["chat_template"] = found["tokenizer"].chat_template
        if (template := adapter / "chat_template.jinja").exists():
            found["chat_template"] = template.read_text(encoding="utf-8")
    except Exception as error:  # of many types, as above
        reason = shortened(why(str(adapter), error))
        raise RecipeError(f"model {adapter}: its tokenizer cannot be opened: {reason}") from error
    return found


def chat_template(processor: Any) -> str:
    """The template that makes prompts: the processor's own, or its tokenizer's, or a plain one of its family.

    Raises   RecipeError  when there is none
    """
    found = processor.chat_template or processor.tokenizer.chat_template
    if isinstance(found, dict):  # several, by name
        found = found.get("default")
    found = found or PLAIN_TEMPLATES.get(type(processor).__name__)
    if not found:
        raise RecipeError(
            f"{processor.tokenizer.name_or_path} has no chat template; it makes the prompts. Give the path of one, "
            "a Jinja file, as data.chat_template"
        )
    return found


def _needs_torchvision(error: BaseException) -> bool:
    """Whether torchvision is missing, and this error or what it came from says so."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    return not is_torchvision_available() and any("torchvision" in str(one).lower() for one in causes)


def _image_processor(model: str, revision: str | None, bounds: dict[str, int]) -> Any:
    """The PIL form of the image processor, by name: ``...ImageProcessor`` or ``...Fast`` or ``...Pil``."""
    name = str(get_image_processor_config(model, revision=revision).get("image_processor_type"))
    if name == "None":  # a model that is not there is told as that, and not as torchvision that is missing
        AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    family = name.removesuffix("Fast").removesuffix("Pil")
    found = getattr(transformers, f"{family}Pil", None)
    if found is not None:
        return found.from_pretrained(model, revision=revision, **bounds)
    backend = "torchvision" if hasattr(transformers, family) else "pil"
    return AutoImageProcessor.from_pretrained(
        model, revision=revision, backend=backend, trust_remote_code=False, **bounds
    )


def _arguments(model: str, revision: str | None, images: Any) -> tuple[Any, dict[str, Any]]:
    """The processor's class, and its parts and settings; those for video and audio are None."""
    processor_class = _processor_class(model, revision)
    # A processor of Mistral's models takes tokenizer.json as it is, whatever other files there are.
    is_mistral = processor_class.__name__ == "PixtralProcessor"
    opener: Any = PreTrainedTokenizerFast if is_mistral else AutoTokenizer
    tokenizer = opener.from_pretrained(model, revision=revision, trust_remote_code=False)
    found, _ = processor_class.get_processor_dict(model, revision=revision)
    names = processor_class.get_attributes()
    taken = inspect.signature(processor_class.__init__).parameters.keys() - names
    settings = {name: value for name, value in found.items() if name in taken}
    settings["chat_template"] = found.get("chat_template") or tokenizer.chat_template
    settings = {name: value for name, value in settings.items() if value is not None}
    parts = dict.fromkeys(names) | {"image_processor": images, "tokenizer": tokenizer}
    return processor_class, parts | settings


def _processor_class(model: str, revision: str | None) -> Any:
    """The class that the model's files name, or else the one of its type, as ``AutoProcessor`` finds it.

    Raises   RecipeError  when there is none
    """
    of_processor, _ = ProcessorMixin.get_processor_dict(model, revision=revision)
    of_images = get_image_processor_config(model, revision=revision)
    for settings in (of_processor, of_images, get_tokenizer_config(model, revision=revision)):
        found = processor_class_from_name(str(settings.get("processor_class")))
        if found is not None:
            return found
    config = AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    found = PROCESSOR_MAPPING.get(type(config), None)
    if found is None:
        raise RecipeError(f"model {model}: {config.model_type!r} has no processor for pictures and text")
    return found


def _built(processor_class: Any, arguments: dict[str, Any]) -> Any:
    """An object of that class; its constructor would refuse parts that are None."""
    if processor_class is SmolVLMProcessor and smolvlm.num2words is None:
        smolvlm.num2words = str  # spells the number of a video's frames, and is asked for all the same
    processor = processor_class.__new__(processor_class)
    processor.check_argument_for_proper_class = lambda name, part: None
    processor.__init__(**arguments)
    del processor.check_argument_for_proper_class
    return processor
