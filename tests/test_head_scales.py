"""What a family's own class multiplies its logits by: with ``split`` they are the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from shared.models.vlm import last_hidden_states, scale_left_out, split

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 128,
    "pad_token_id": 0,
    "initializer_range": 0.1,
}
SIZE = {"hidden_size": 32, "intermediate_size": 48}
SIGLIP = SIZE | {
    "model_type": "siglip_vision_model",
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
QWEN = SIZE | {"model_type": "qwen2_5_vl_vision", "depth": 1, "num_heads": 2, "out_hidden_size": 32}
# Family, settings of its text model, vision tower, what its class multiplies by, what its text model alone does.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], float, float]] = {
    "Aya Vision": ("aya_vision", {"model_type": "cohere2", "logit_scale": 0.25}, SIGLIP, 1.0, 0.25),
    "Granite Vision 3": ("llava_next", {"model_type": "granite", "logits_scaling": 8.0}, SIGLIP, 1.0, 0.125),
    "HyperCLOVA X": (
        "hyperclovax_vision_v2",
        {"model_type": "hyperclovax", "logits_scaling": 0.125},
        QWEN,
        0.125,
        0.125,
    ),
    "LLaVA-NeXT": ("llava_next", {"model_type": "mistral"}, SIGLIP, 1.0, 1.0),
}


@pytest.mark.parametrize("case", CASES)
def test_body_and_head_give_the_model_s_own_logits(case: str) -> None:
    family, settings, vision, scale, of_text = CASES[case]
    if family not in CONFIG_MAPPING_NAMES:
        pytest.skip("needs a newer transformers")
    config = AutoConfig.for_model(
        family, text_config=TEXT | settings, vision_config=vision, dtype="float32", image_token_index=127
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = AutoModelForImageTextToText.from_config(config).eval()
    ids = torch.arange(10, 42).view(2, 16)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    body, head = split(model)
    with torch.no_grad():
        own, hidden = model(**inputs, use_cache=False).logits, last_hidden_states(body, inputs)
    assert head.scale == scale
    torch.testing.assert_close(head.logits(hidden), own)
    note = scale_left_out(config)
    if scale == of_text:
        assert note is None
    else:
        assert note is not None
        assert f"multiplies its logits by {of_text:g}" in note
        assert f"a temperature of {1 / of_text:g}" in note
