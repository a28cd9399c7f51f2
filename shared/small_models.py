"""Small instances of the real Qwen3.5 classes, for trials that need no network.

    python -m shared.small_models phantom          # the models of a recipe's bootstrap section

A folder made here is an ordinary Hugging Face folder: vision tower, linear and full attention, a byte-level
BPE tokenizer trained on the data set's texts, a chat template, an image processor.  Models of one recipe
share their tokenizer byte for byte.  The same inputs give the same bytes; a folder appears whole or not at
all.
``save_reference_config`` writes full-size configurations without weights, to check a recipe offline.

What takes seconds to import is imported where it is used: by then the command answers Ctrl-C.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from shared.cli import load_recipe, recipe_arguments, run
from shared.errors import RecipeError
from shared.library_output import quiet_libraries

if TYPE_CHECKING:
    from transformers import Qwen2VLImageProcessorPil, Qwen3_5Config

    from shared.recipes import SmallModelConfig, SmallModelsConfig

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
HEAD_DIM = 32
PATCH_SIZE, MERGE_SIZE = 16, 2  # as in Qwen3.5: a vision token for every 32 x 32 pixels
TEMPORAL_PATCH_SIZE = (
    1  # Qwen3.5's 2 takes a picture as two equal frames, which doubles the patch embedding's work
)
INITIALIZER_RANGE = 0.05  # with Qwen3.5's 0.02 so narrow a model looked at its pictures some 100 steps later

END_OF_TURN, PAD = "<|im_end|>", "<|endoftext|>"
SPECIAL_TOKENS = ["<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TEXT_TOKENS = ["<think>", "</think>"]  # added, not special, as in Qwen3.5

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- else -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# Shapes of the released models where they differ from transformers' Qwen3_5Config(), whose text model is the
# 9B one.  4B: https://apxml.com/models/qwen35-4b, the configuration of its fine-tune
# https://huggingface.co/Chat2Find/Chat2Find-CPT; its vision tower is that of Qwen3-VL-4B (24 layers of 1024).
REFERENCE_SHAPES: dict[str, dict[str, Any]] = {
    "9B": {
        "text_config": {"hidden_size": 4096, "intermediate_size": 12288},
        "vision_config": {"out_hidden_size": 4096},
        "tie_word_embeddings": False,
    },
    "4B": {
        "text_config": {"hidden_size": 2560, "intermediate_size": 9216},
        "vision_config": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "out_hidden_size": 2560,
        },
        "tie_word_embeddings": True,
    },
}


def train_tokenizer(texts: Iterable[str], out: Path, *, vocab_size: int) -> Path:
    """Writes a tokenizer of Qwen3.5's class, with at most ``vocab_size`` tokens, and the chat template."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen3_5Tokenizer

    model = Qwen3_5Tokenizer().backend_tokenizer
    trained = Tokenizer(models.BPE())
    trained.normalizer, trained.pre_tokenizer = model.normalizer, model.pre_tokenizer
    num_added = len({END_OF_TURN, PAD, *SPECIAL_TOKENS, *TEXT_TOKENS})
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - num_added, initial_alphabet=sorted(alphabet), show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    bpe = json.loads(trained.to_str())["model"]
    learned: dict[str, Any] = {"vocab": bpe["vocab"], "merges": [tuple(merge) for merge in bpe["merges"]]}
    tokenizer = Qwen3_5Tokenizer(
        **learned,
        eos_token=END_OF_TURN,
        pad_token=PAD,
        extra_special_tokens=SPECIAL_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in TEXT_TOKENS])
    tokenizer.save_pretrained(out)
    return out


def make_small_model(
    out: str | Path,
    *,
    tokenizer: str | Path,
    hidden_size: int,
    num_layers: int,
    vision_hidden_size: int,
    vision_depth: int,
    seed: int,
    tie_word_embeddings: bool = True,
) -> Path:
    """Makes the folder ``out``: a small model with random weights and the tokenizer of another folder.

    Raises   RecipeError  when ``out`` is there already or a hidden size is not a multiple of the head's 32.
    """
    import torch
    from transformers import GenerationConfig, Qwen3_5ForConditionalGeneration, Qwen3_5Tokenizer

    quiet_libraries()
    out = Path(out)
    for size in (hidden_size, vision_hidden_size):
        if size % HEAD_DIM:
            raise RecipeError(f"small model {out}: hidden size {size} is not a multiple of {HEAD_DIM}")
    token_ids = Qwen3_5Tokenizer.from_pretrained(tokenizer).get_vocab()
    config = _small_config(
        token_ids,
        hidden_size=hidden_size,
        num_layers=num_layers,
        vision_hidden_size=vision_hidden_size,
        vision_depth=vision_depth,
        tie_word_embeddings=tie_word_embeddings,
    )
    with _appearing_whole(out) as folder:
        for name in TOKENIZER_FILES:
            shutil.copyfile(Path(tokenizer) / name, folder / name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Qwen3_5ForConditionalGeneration(config)
        model.generation_config = GenerationConfig(
            eos_token_id=token_ids[END_OF_TURN], pad_token_id=token_ids[PAD]
        )
        model.save_pretrained(folder)
        _image_processor(
            min_pixels=64 * 64, max_pixels=160 * 160, temporal_patch_size=TEMPORAL_PATCH_SIZE
        ).save_pretrained(folder)
    return out


def make_small_models(config: SmallModelsConfig, texts: Iterable[str]) -> list[Path]:
    """Makes those models of a recipe that are missing; the tokenizer of one that is there is used again."""
    there = [Path(model.path) for model in config.models if Path(model.path).exists()]
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer = there[0] if there else train_tokenizer(texts, Path(scratch), vocab_size=config.vocab_size)
        return [_make(model, tokenizer) for model in config.models if not Path(model.path).exists()]


def save_reference_config(out: str | Path, size: Literal["9B", "4B"]) -> Path:
    """Writes the configuration of Qwen3.5-9B or -4B without weights, as far as a memory estimate needs it."""
    from transformers import Qwen3_5Config

    with _appearing_whole(Path(out)) as folder:
        Qwen3_5Config(**REFERENCE_SHAPES[size]).save_pretrained(folder)
        _image_processor(min_pixels=65536, max_pixels=16777216).save_pretrained(folder)
    return Path(out)


def _make(model: SmallModelConfig, tokenizer: Path) -> Path:
    sizes = model.model_dump(exclude={"path"})
    return make_small_model(model.path, tokenizer=tokenizer, **sizes)


def _small_config(
    token_ids: dict[str, int],
    *,
    hidden_size: int,
    num_layers: int,
    vision_hidden_size: int,
    vision_depth: int,
    tie_word_embeddings: bool,
) -> Qwen3_5Config:
    """Qwen3.5's proportions at another size; the vocabulary is padded to a multiple of 64, as theirs is.

    Every second layer has full attention, not every fourth: on a CPU it takes half the time of a linear one.
    """
    from transformers import Qwen3_5Config

    num_heads = hidden_size // HEAD_DIM
    full = {index for index in range(num_layers) if index % 2 == 1 or index == num_layers - 1}
    text = {
        "vocab_size": math.ceil(len(token_ids) / 64) * 64,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": num_layers,
        "layer_types": ["full_attention" if i in full else "linear_attention" for i in range(num_layers)],
        "num_attention_heads": num_heads,
        "num_key_value_heads": math.gcd(num_heads, 2),
        "head_dim": HEAD_DIM,
        "linear_key_head_dim": HEAD_DIM,
        "linear_value_head_dim": HEAD_DIM,
        "linear_num_key_heads": num_heads // math.gcd(num_heads, 2),
        "linear_num_value_heads": num_heads,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_interleaved": True,
            "mrope_section": [4, 2, 2],
        },
        "tie_word_embeddings": tie_word_embeddings,
        "initializer_range": INITIALIZER_RANGE,
        "eos_token_id": token_ids[END_OF_TURN],
        "pad_token_id": token_ids[PAD],
    }
    vision = {
        "depth": vision_depth,
        "hidden_size": vision_hidden_size,
        "intermediate_size": 4 * vision_hidden_size,
        "num_heads": vision_hidden_size // HEAD_DIM,
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "spatial_merge_size": MERGE_SIZE,
        "out_hidden_size": hidden_size,
        "num_position_embeddings": 64,
        "initializer_range": INITIALIZER_RANGE,
    }
    return Qwen3_5Config(
        text_config=text,
        vision_config=vision,
        image_token_id=token_ids["<|image_pad|>"],
        video_token_id=token_ids["<|video_pad|>"],
        vision_start_token_id=token_ids["<|vision_start|>"],
        vision_end_token_id=token_ids["<|vision_end|>"],
        tie_word_embeddings=tie_word_embeddings,
        dtype="float32",
    )


def _image_processor(
    *,
    min_pixels: int,
    max_pixels: int,
    temporal_patch_size: int = 2,  # the released models'
) -> Qwen2VLImageProcessorPil:
    from transformers import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE,
        temporal_patch_size=temporal_patch_size,
        merge_size=MERGE_SIZE,
        size={"shortest_edge": min_pixels, "longest_edge": max_pixels},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


@contextmanager
def _appearing_whole(out: Path) -> Iterator[Path]:
    """A folder to write into, renamed to ``out`` when all went well and removed when not."""
    if out.exists():
        raise RecipeError(f"{out} is there already; remove it to make it again")
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        folder = scratch / out.name
        folder.mkdir()
        yield folder
        os.rename(folder, out)
    except OSError as error:
        if not out.exists():
            raise
        raise RecipeError(
            f"{out}: another process has made it meanwhile. Run the same command again"
        ) from error
    finally:
        shutil.rmtree(scratch)


@click.command()
@recipe_arguments
def main(recipe: str, overrides: tuple[str, ...]) -> None:
    """Makes the small models of RECIPE, with a tokenizer trained on the texts of its training split."""
    from shared.data.rows import open_split

    quiet_libraries()
    plan = load_recipe(recipe, overrides=overrides)
    if plan.bootstrap.small_models is None:
        raise RecipeError(f"recipe {recipe} has no bootstrap.small_models section; there is nothing to make")
    examples = open_split(plan.data, "train")
    texts = (
        part for example in examples for turn in example.turns for part in turn.parts if part is not None
    )
    for folder in make_small_models(plan.bootstrap.small_models, texts):
        click.echo(f"made {folder}")


if __name__ == "__main__":
    run(main)
