"""A small random model of every family that is supported: the real classes, with a tokenizer trained here.

    folder = make_family("gemma3", tmp_path / "gemma3")      # opens like a model from the Hub

The folders hold what a model's folder on the Hub holds: weights, tokenizer, image processor, processor settings and a
chat template in the family's manner.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from samples import ANSWERS, QUESTIONS
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.paligemma.processing_paligemma import EXTRA_TOKENS

SEED = 3
TEXTS = [*QUESTIONS, *ANSWERS, "user model assistant system USER ASSISTANT User Assistant human\n"] * 4
WIDTH = 32  # of hidden states
TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
}
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.1,
}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}

Ids = Callable[[str], int]


@dataclass(frozen=True)
class Family:
    """How a small model of a family is made.

    title     as users call it
    config    from the number of token ids and a function that gives a token's id
    images    name of the image processor's class (the one of PIL, where there is one), and its settings
    named     special tokens that the tokenizer knows by name, such as ``image_token``
    template  None where the family's folders have none
    text      tokens that are added and not special, and that the tokenizer's model writes as well
    last      special tokens behind all others
    """

    title: str
    config: Callable[[int, Ids], dict[str, Any]]
    images: tuple[str, dict[str, Any]]
    processor: str
    template: str | None
    end_of_turn: str
    settings: dict[str, Any] = field(default_factory=dict)
    special: tuple[str, ...] = ()
    named: dict[str, str] = field(default_factory=dict)
    text: tuple[str, ...] = ()
    last: tuple[str, ...] = ()
    bos: str | None = None
    eos: str | None = None
    adds_bos: bool = False
    is_sentencepiece: bool = False

    @property
    def tokens(self) -> list[str]:
        eos = self.eos or self.end_of_turn
        found = ["<pad>", *([self.bos] if self.bos else []), eos, self.end_of_turn]
        return list(dict.fromkeys([*found, *self.special, *self.named.values()]))


def chatml(picture: str) -> str:
    """Turns between <|im_start|> and <|im_end|>, as Qwen and InternVL write them."""
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        "{% if part.type == 'image' %}" + picture + "{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def headed(start: str, stop: str, end: str, picture: str, *, assistant: str = "assistant") -> str:
    """Turns under a header, behind a token that begins the text, as Llama and Gemma write them."""
    return (
        "{{ bos_token }}{% for message in messages %}"
        "{% set role = '" + assistant + "' if message.role == 'assistant' else message.role %}"
        "{{ '" + start + "' + role + '" + stop + "' }}"
        "{% if message.content is string %}{{ message.content | trim }}{% else %}{% for part in message.content %}"
        "{% if part.type == 'image' %}" + picture + "{% else %}{{ part.text | trim }}{% endif %}"
        "{% endfor %}{% endif %}{{ '" + end + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + start + assistant + stop + "' }}{% endif %}"
    )


def spoken(user: str, assistant: str, end: str, picture: str, *, end_of_user: str = " ") -> str:
    """Turns behind a name and a colon, as LLaVA, Idefics and SmolVLM write them."""
    return (
        "{% for message in messages %}"
        "{{ ('" + assistant + "' if message.role == 'assistant' else '" + user + "') + ':' }}"
        "{% for part in message.content %}{% if part.type == 'image' %}" + picture + "{% else %}"
        "{{ ' ' + part.text }}{% endif %}{% endfor %}"
        "{{ '" + end + "' if message.role == 'assistant' else '" + end_of_user + "' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '" + assistant + ":' }}{% endif %}"
    )


INSTRUCTED = (  # as Mistral writes turns
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'system' %}[SYSTEM_PROMPT]"
    "{% for part in message.content %}{{ part.text }}{% endfor %}[/SYSTEM_PROMPT]"
    "{% elif message.role == 'user' %}[INST]"
    "{% for part in message.content %}{% if part.type == 'image' %}[IMG]{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}[/INST]"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{{ eos_token }}{% endif %}{% endfor %}"
)

QWEN_TOKENS = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
QWEN_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"


def _qwen_images(patch_size: int) -> tuple[str, dict[str, Any]]:
    area = (2 * patch_size) ** 2
    size = {"shortest_edge": 2 * area, "longest_edge": 8 * area}
    return "Qwen2VLImageProcessorPil", {"patch_size": patch_size, "merge_size": 2, "size": size, **HALF}


def _qwen_ids(token: Ids) -> dict[str, Any]:
    return {
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
    }


def _mrope(section: list[int], **more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section, **more}


def _qwen2_vl(size: int, token: Ids) -> dict[str, Any]:
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": WIDTH,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 8,
    }
    text = TEXT | {"vocab_size": size, "rope_parameters": _mrope([2, 3, 3])}
    return {"model_type": "qwen2_vl", "vision_config": vision, "text_config": text, **_qwen_ids(token)}


def _qwen2_5_vl(size: int, token: Ids) -> dict[str, Any]:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": WIDTH,
        "num_heads": 2,
        "intermediate_size": 48,
    }
    vision |= {"patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1]}
    text = TEXT | {"vocab_size": size, "rope_parameters": _mrope([2, 3, 3])}
    return {"model_type": "qwen2_5_vl", "vision_config": vision, "text_config": text, **_qwen_ids(token)}


def _qwen3_vision(**more: Any) -> dict[str, Any]:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": WIDTH,
        "num_heads": 2,
        "intermediate_size": 48,
    }
    return vision | {"patch_size": 8, "num_position_embeddings": 16, "initializer_range": 0.1, **more}


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _qwen3_vl(size: int, token: Ids) -> dict[str, Any]:
    text = TEXT | {"vocab_size": size, "head_dim": 16}
    text |= {"rope_parameters": _mrope([4, 2, 2], mrope_interleaved=True)}
    vision = _qwen3_vision(deepstack_visual_indexes=[0])
    return {"model_type": "qwen3_vl", "vision_config": vision, "text_config": text, **_qwen_ids(token)}


def _qwen3_vl_moe(size: int, token: Ids) -> dict[str, Any]:
    config = _qwen3_vl(size, token)
    return config | {"model_type": "qwen3_vl_moe", "text_config": config["text_config"] | EXPERTS}


def _qwen3_5(size: int, token: Ids) -> dict[str, Any]:
    text = TEXT | {"vocab_size": size, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
    text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
    text |= {"rope_parameters": _mrope([2, 1, 1], mrope_interleaved=True, partial_rotary_factor=0.5)}
    return {
        "model_type": "qwen3_5",
        "vision_config": _qwen3_vision(),
        "text_config": text,
        **_qwen_ids(token),
    }


def _qwen3_5_moe(size: int, token: Ids) -> dict[str, Any]:
    config = _qwen3_5(size, token)
    experts = EXPERTS | {"shared_expert_intermediate_size": 32}
    return config | {"model_type": "qwen3_5_moe", "text_config": config["text_config"] | experts}


def _idefics3(size: int, token: Ids) -> dict[str, Any]:
    return {
        "model_type": "idefics3",
        "vision_config": VISION | {"image_size": 32, "patch_size": 8},
        "text_config": TEXT | {"model_type": "llama", "vocab_size": size, "pad_token_id": token("<pad>")},
        "image_token_id": token("<image>"),
        "scale_factor": 2,
    }


def _gemma3(size: int, token: Ids) -> dict[str, Any]:
    text = TEXT | {"vocab_size": size, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
    text |= {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    return {
        "model_type": "gemma3",
        "vision_config": VISION | {"image_size": 32, "patch_size": 8, "vision_use_head": False},
        "text_config": text,
        "mm_tokens_per_image": 4,
        "boi_token_index": token("<start_of_image>"),
        "eoi_token_index": token("<end_of_image>"),
        "image_token_index": token("<image_soft_token>"),
    }


def _gemma4(size: int, token: Ids) -> dict[str, Any]:
    text = TEXT | {"vocab_size": size, "head_dim": 16, "sliding_window": 16, "num_hidden_layers": 3}
    text |= {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "global_head_dim": 16}
    text |= {"vocab_size_per_layer_input": size, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1}
    text |= {"final_logit_softcapping": 5.0, "use_bidirectional_attention": "vision"}
    vision = VISION | {"head_dim": 16, "num_key_value_heads": 2, "patch_size": 4, "pooling_kernel_size": 3}
    return {
        "model_type": "gemma4",
        "vision_config": vision | {"position_embedding_size": 128},
        "text_config": text,
        "boi_token_id": token("<|image>"),
        "eoi_token_id": token("<image|>"),
        "image_token_id": token("<|image|>"),
        "video_token_id": token("<|video|>"),
        "audio_token_id": token("<|audio|>"),
        "boa_token_id": token("<|audio>"),
        "eoa_token_index": token("<audio|>"),
    }


def _paligemma(size: int, token: Ids) -> dict[str, Any]:
    text = TEXT | {"model_type": "gemma2", "vocab_size": size, "head_dim": 16, "query_pre_attn_scalar": 16}
    text |= {"sliding_window": 16, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 50.0}
    return {
        "model_type": "paligemma",
        "vision_config": VISION
        | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, "vision_use_head": False},
        "text_config": text,
        "projection_dim": WIDTH,
        "image_token_index": token("<image>"),
    }


CLIP = VISION | {"model_type": "clip_vision_model", "projection_dim": 32, "image_size": 28, "patch_size": 14}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}


def _llava(size: int, token: Ids) -> dict[str, Any]:
    return {
        "model_type": "llava",
        "vision_config": CLIP,
        "text_config": TEXT | {"model_type": "llama", "vocab_size": size},
        "image_token_index": token("<image>"),
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


PINPOINTS = [[28, 56], [56, 28], [56, 56]]


def _llava_next(size: int, token: Ids) -> dict[str, Any]:
    mistral = TEXT | {"model_type": "mistral", "vocab_size": size, "head_dim": 16, "sliding_window": None}
    return _llava(size, token) | {
        "model_type": "llava_next",
        "text_config": mistral,
        "image_grid_pinpoints": PINPOINTS,
    }


def _llava_onevision(size: int, token: Ids) -> dict[str, Any]:
    return {
        "model_type": "llava_onevision",
        "vision_config": SIGLIP | {"vision_use_head": False},
        "text_config": TEXT | {"model_type": "qwen2", "vocab_size": size},
        "image_token_index": token("<image>"),
        "video_token_index": token("<video>"),
        "image_grid_pinpoints": PINPOINTS,
        "vision_aspect_ratio": "anyres_max_4",
    }


def _internvl(size: int, token: Ids) -> dict[str, Any]:
    return {
        "model_type": "internvl",
        "vision_config": VISION | {"image_size": [32, 32], "patch_size": [8, 8]},
        "text_config": TEXT | {"model_type": "qwen2", "vocab_size": size},
        "image_token_id": token("<IMG_CONTEXT>"),
        "image_seq_length": 4,
        "downsample_ratio": 0.5,
    }


PIXTRAL = VISION | {"model_type": "pixtral", "image_size": 64, "patch_size": 8}


def _mistral3(size: int, token: Ids) -> dict[str, Any]:
    return {
        "model_type": "mistral3",
        "vision_config": PIXTRAL,
        "text_config": TEXT
        | {"model_type": "mistral", "vocab_size": size, "head_dim": 16, "sliding_window": None},
        "image_token_index": token("[IMG]"),
        "spatial_merge_size": 2,
    }


def _pixtral(size: int, token: Ids) -> dict[str, Any]:
    config = _mistral3(size, token) | {"model_type": "llava", "vision_feature_layer": -1}
    del config["spatial_merge_size"]
    return config | {"vision_feature_select_strategy": "full", "image_seq_length": 1}


def _mllama(size: int, token: Ids) -> dict[str, Any]:
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1}
    vision |= {"attention_heads": 2, "image_size": 28, "patch_size": 14, "max_num_tiles": 4}
    vision |= {"intermediate_layers_indices": [0], "vision_output_dim": 64, "initializer_range": 0.1}
    # As the real one: its table of embeddings has more rows than its head, and the picture's is the first of these.
    vocab_size = token("<|image|>")
    text = TEXT | {"num_hidden_layers": 3, "vocab_size": vocab_size, "cross_attention_layers": [1]}
    text |= {"pad_token_id": token("<pad>"), "bos_token_id": token("<|begin_of_text|>")}
    text |= {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    return {
        "model_type": "mllama",
        "vision_config": vision,
        "text_config": text,
        "image_token_index": token("<|image|>"),
    }


def _llama4(size: int, token: Ids) -> dict[str, Any]:
    vision = VISION | {"image_size": 28, "patch_size": 7, "pixel_shuffle_ratio": 0.5, "vision_output_dim": 32}
    vision |= {"intermediate_size": 4 * WIDTH, "projector_input_dim": 32, "projector_output_dim": 32}
    text = TEXT | {"vocab_size": size, "head_dim": 16, "intermediate_size_mlp": 64, "num_local_experts": 2}
    text |= {"interleave_moe_layer_step": 2, "attention_chunk_size": 64, "no_rope_layer_interval": 2}
    return {
        "model_type": "llama4",
        "vision_config": vision,
        "text_config": text,
        "boi_token_index": token("<|image_start|>"),
        "eoi_token_index": token("<|image_end|>"),
        "image_token_index": token("<|patch|>"),
    }


def _qwen(
    title: str, config: Callable[[int, Ids], dict[str, Any]], processor: str, patch_size: int = 8
) -> Family:
    return Family(
        title,
        config,
        images=_qwen_images(patch_size),
        processor=processor,
        template=chatml(QWEN_PICTURE),
        end_of_turn="<|im_end|>",
        special=QWEN_TOKENS,
    )


IDEFICS_IMAGES = {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}, **HALF}
IDEFICS_GRID = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
IDEFICS_TOKENS = ("<fake_token_around_image>", "<image>", "<global-img>", *IDEFICS_GRID)
LLAMA_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|end_of_text|>")
MISTRAL_TOKENS = (
    "[INST]",
    "[/INST]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[IMG]",
    "[IMG_BREAK]",
    "[IMG_END]",
)
LLAMA4_TOKENS = (
    "<|header_start|>",
    "<|header_end|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|image|>",
    "<|patch|>",
)
LLAMA4_TOKENS += ("<|tile_x_separator|>", "<|tile_y_separator|>")

FAMILIES: dict[str, Family] = {
    "qwen2_vl": _qwen("Qwen2-VL", _qwen2_vl, "Qwen2VLProcessor"),
    "qwen2_5_vl": _qwen("Qwen2.5-VL", _qwen2_5_vl, "Qwen2_5_VLProcessor"),
    "qwen3_vl": _qwen("Qwen3-VL", _qwen3_vl, "Qwen3VLProcessor"),
    "qwen3_vl_moe": _qwen("Qwen3-VL-MoE", _qwen3_vl_moe, "Qwen3VLProcessor"),
    "qwen3_5": _qwen("Qwen3.5", _qwen3_5, "Qwen3VLProcessor"),
    "qwen3_5_moe": _qwen("Qwen3.5-MoE", _qwen3_5_moe, "Qwen3VLProcessor"),
    "smolvlm": Family(
        "SmolVLM",
        lambda size, token: _idefics3(size, token) | {"model_type": "smolvlm"},
        images=("SmolVLMImageProcessorPil", IDEFICS_IMAGES),
        processor="SmolVLMProcessor",
        settings={"image_seq_len": 4},
        template="<|im_start|>"
        + spoken("User", "Assistant", "<end_of_utterance>\n", "<image>", end_of_user="<end_of_utterance>\n"),
        end_of_turn="<end_of_utterance>",
        special=("<|im_start|>", "<|im_end|>", *IDEFICS_TOKENS),
        bos="<|im_start|>",
        eos="<|im_end|>",
    ),
    "idefics3": Family(
        "Idefics3",
        _idefics3,
        images=("Idefics3ImageProcessorPil", IDEFICS_IMAGES),
        processor="Idefics3Processor",
        settings={"image_seq_len": 4},
        template="<|begin_of_text|>"
        + spoken("User", "Assistant", "<end_of_utterance>\n", "<image>", end_of_user="<end_of_utterance>\n"),
        end_of_turn="<end_of_utterance>",
        special=("<|begin_of_text|>", *IDEFICS_TOKENS),
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        adds_bos=True,
    ),
    "gemma3": Family(
        "Gemma 3",
        _gemma3,
        images=(
            "Gemma3ImageProcessorPil",
            {"size": {"height": 32, "width": 32}, "image_seq_length": 4, **HALF},
        ),
        processor="Gemma3Processor",
        settings={"image_seq_length": 4},
        template=headed("<start_of_turn>", "\n", "<end_of_turn>\n", "<start_of_image>", assistant="model"),
        end_of_turn="<end_of_turn>",
        special=("<start_of_turn>",),
        named={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
        text=("\n", "\n\n"),
        bos="<bos>",
        eos="<eos>",
        adds_bos=True,
        is_sentencepiece=True,
    ),
    "gemma4": Family(
        "Gemma 4",
        _gemma4,
        images=(
            "Gemma4ImageProcessorPil",
            {"patch_size": 4, "max_soft_tokens": 70, "pooling_kernel_size": 3},
        ),
        processor="Gemma4Processor",
        template=headed("<|turn>", "\n", "<turn|>\n", "<|image|>", assistant="model"),
        end_of_turn="<turn|>",
        special=("<|turn>", "<|video|>"),
        named={
            "boi_token": "<|image>",
            "eoi_token": "<image|>",
            "image_token": "<|image|>",
            "boa_token": "<|audio>",
            "eoa_token": "<audio|>",
            "audio_token": "<|audio|>",
        },
        bos="<bos>",
        eos="<eos>",
        adds_bos=True,
        is_sentencepiece=True,
    ),
    "paligemma": Family(
        "PaliGemma",
        _paligemma,
        images=(
            "SiglipImageProcessorPil",
            {"size": {"height": 28, "width": 28}, "image_seq_length": 4, **HALF},
        ),
        processor="PaliGemmaProcessor",
        template=None,
        end_of_turn="<eos>",
        special=("<image>", *EXTRA_TOKENS),
        bos="<bos>",
        eos="<eos>",
        adds_bos=True,
        is_sentencepiece=True,
    ),
    "llava": Family(
        "LLaVA-1.5",
        _llava,
        images=(
            "CLIPImageProcessorPil",
            {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}},
        ),
        processor="LlavaProcessor",
        settings={
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        template=spoken("USER", "ASSISTANT", "</s>", " <image>\n"),
        end_of_turn="</s>",
        special=("<image>",),
        bos="<s>",
        adds_bos=True,
        is_sentencepiece=True,
    ),
    "llava_next": Family(
        "LLaVA-NeXT",
        _llava_next,
        images=(
            "LlavaNextImageProcessorPil",
            {
                "size": {"shortest_edge": 28},
                "crop_size": {"height": 28, "width": 28},
                "image_grid_pinpoints": PINPOINTS,
            },
        ),
        processor="LlavaNextProcessor",
        settings={
            "patch_size": 14,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        template=spoken("USER", "ASSISTANT", "</s>", " <image>\n"),
        end_of_turn="</s>",
        special=("<image>",),
        bos="<s>",
        adds_bos=True,
        is_sentencepiece=True,
    ),
    "llava_onevision": Family(
        "LLaVA-OneVision",
        _llava_onevision,
        images=(
            "LlavaOnevisionImageProcessorPil",
            {"size": {"height": 28, "width": 28}, "image_grid_pinpoints": PINPOINTS, **HALF},
        ),
        processor="LlavaOnevisionProcessor",
        settings={
            "num_image_tokens": 4,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_4",
        },
        template=chatml("<image>"),
        end_of_turn="<|im_end|>",
        special=("<|im_start|>", "<image>", "<video>"),
    ),
    "internvl": Family(
        "InternVL",
        _internvl,
        images=(
            "GotOcr2ImageProcessorPil",
            {"size": {"height": 32, "width": 32}, "crop_to_patches": True, "max_patches": 4, **HALF},
        ),
        processor="InternVLProcessor",
        settings={"image_seq_length": 4},
        template=chatml("<IMG_CONTEXT>\n".replace("\n", "\n")),
        end_of_turn="<|im_end|>",
        special=("<|im_start|>",),
        named={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
    ),
    "mistral3": Family(
        "Mistral 3",
        _mistral3,
        images=("PixtralImageProcessorPil", {"size": {"longest_edge": 64}, "patch_size": 8, **HALF}),
        processor="PixtralProcessor",
        settings={"patch_size": 8, "spatial_merge_size": 2},
        template=INSTRUCTED,
        end_of_turn="</s>",
        special=MISTRAL_TOKENS,
        bos="<s>",
    ),
    "pixtral": Family(
        "Pixtral",
        _pixtral,
        images=("PixtralImageProcessorPil", {"size": {"longest_edge": 48}, "patch_size": 8, **HALF}),
        processor="PixtralProcessor",
        settings={"patch_size": 8},
        template=INSTRUCTED,
        end_of_turn="</s>",
        special=MISTRAL_TOKENS,
        bos="<s>",
    ),
    "mllama": Family(
        "Mllama (Llama 3.2 Vision)",
        _mllama,
        images=(
            "MllamaImageProcessorPil",
            {"size": {"height": 28, "width": 28}, "max_image_tiles": 4, **HALF},
        ),
        processor="MllamaProcessor",
        template=headed("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", "<|image|>"),
        end_of_turn="<|eot_id|>",
        special=LLAMA_TOKENS,
        last=("<|image|>",),
        bos="<|begin_of_text|>",
        adds_bos=True,
    ),
    "llama4": Family(
        "Llama 4",
        _llama4,
        images=("Llama4ImageProcessor", {"size": {"height": 28, "width": 28}, "max_patches": 4, **HALF}),
        processor="Llama4Processor",
        settings={"patch_size": 7},
        template=headed("<|header_start|>", "<|header_end|>\n\n", "<|eot|>", "<|image|>"),
        end_of_turn="<|eot|>",
        special=LLAMA4_TOKENS,
        bos="<|begin_of_text|>",
        adds_bos=True,
    ),
}


IS_OLD = Version(transformers.__version__) < Version("5.23")
HAS_TORCHVISION = importlib.util.find_spec("torchvision") is not None
# These have no processor, or no image processor, without it.
NEED_TORCHVISION = {"llama4", "mistral3", "pixtral"} | (
    {"gemma4", "idefics3", "smolvlm"} if IS_OLD else set()
)
MISSING = {} if HAS_TORCHVISION else dict.fromkeys(NEED_TORCHVISION, "needs torchvision")
REFUSED = {"paligemma": "that version of Transformers leaves out its soft cap"} if IS_OLD else {}


def of_families(names: Iterable[str], *, without: Mapping[str, str] = MISSING) -> pytest.MarkDecorator:
    """A test of each of these families as its ``family``.

    without  families that are skipped, and why
    """
    return pytest.mark.parametrize(
        "family",
        [
            pytest.param(name, marks=[pytest.mark.skip(reason=without[name])] if name in without else [])
            for name in names
        ],
    )


def make_family(name: str, folder: Path, **text: Any) -> Path:
    """Makes the folder of a family's small model with random weights, and returns it.

    text  settings of the text model in place of the family's
    """
    family = FAMILIES[name]
    folder.mkdir(parents=True)
    tokenizer = _tokenizer(family)
    tokenizer.save_pretrained(folder)
    _save_processor(family, folder)
    size = -(-(len(tokenizer) + 1) // 8) * 8
    settings = family.config(size, tokenizer.convert_tokens_to_ids)
    eos = tokenizer.convert_tokens_to_ids(family.end_of_turn)
    settings["text_config"] |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos} | text
    config = AutoConfig.for_model(**settings, dtype="float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForImageTextToText.from_config(config)
        stir(model)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    return folder


def stir(model: torch.nn.Module) -> None:
    """Parameters that begin as zeros or ones hide faults: gates, norms and tables get values of their own."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and (parameter == parameter.flatten()[0]).all():
                parameter.add_(torch.randn_like(parameter) * 0.1)


def _save_processor(family: Family, folder: Path) -> None:
    """The files of a folder on the Hub."""
    name, images = family.images
    public = name.removesuffix("Pil")
    settings = images | {"image_processor_type": public, "processor_class": family.processor}
    for default in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        settings.setdefault(default, True)
    if public == "Gemma4ImageProcessor":
        settings["do_normalize"] = False
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    if family.settings:
        settings = {"processor_class": family.processor, **family.settings}
        (folder / "processor_config.json").write_text(json.dumps(settings))
    if family.template is not None:
        (folder / "chat_template.jinja").write_text(family.template)


def _tokenizer(family: Family) -> PreTrainedTokenizerFast:
    backend = _sentencepiece(family) if family.is_sentencepiece else _byte_level(family)
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in family.last])
    if family.adds_bos:
        backend.post_processor = _begins_with(family.bos, backend)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token=family.bos,
        eos_token=family.eos or family.end_of_turn,
        extra_special_tokens=family.named,
        additional_special_tokens=[
            token for token in (*family.special, *family.last) if token not in (family.bos, family.eos)
        ],
    )


def _begins_with(token: str | None, backend: Tokenizer) -> Any:
    assert token is not None
    return processors.TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A $B:1",
        special_tokens=[(token, backend.token_to_id(token))],
    )


def _byte_level(family: Family) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return _trained(backend, family, trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet))


def _sentencepiece(family: Family) -> Tokenizer:
    """Blanks become a letter, and letters that are not known bytes, as SentencePiece does it."""
    backend = Tokenizer(models.BPE(fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend = _trained(backend, family, trainers.BpeTrainer(vocab_size=160))
    content = json.loads(backend.to_str())
    vocab = content["model"]["vocab"]
    for value in range(256):
        vocab[f"<0x{value:02X}>"] = len(vocab)
    content["model"]["byte_fallback"] = True
    for text in family.text:
        if text not in vocab:
            vocab[text] = len(vocab)
            content["model"]["merges"].append([text[:-1], text[-1]])
    backend = Tokenizer.from_str(json.dumps(content))
    backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in family.text])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def _trained(backend: Tokenizer, family: Family, trainer: Any) -> Tokenizer:
    trainer.special_tokens = [AddedToken(token, special=True, normalized=False) for token in family.tokens]
    trainer.show_progress = False
    backend.train_from_iterator(TEXTS, trainer)
    return backend
