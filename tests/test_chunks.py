"""How many positions pass the head together where the recipe does not say."""

from __future__ import annotations

import pytest
import torch

from shared.models.chunks import ON_CPU, automatic_chunk, chunk_positions

GIB = 2**30


def test_a_number_is_taken_as_it_is_and_a_cpu_has_its_own() -> None:
    assert chunk_positions(7, 10**6, torch.device("cpu")) == 7
    assert chunk_positions("auto", 10**6, torch.device("cpu")) == ON_CPU


@pytest.mark.parametrize(
    ("num_ids", "memory_gib", "wanted"),
    [(248_320, 80, 2048), (248_320, 24, 768), (32_000, 24, 2048), (262_144, 8, 256), (10**7, 8, 256)],
)
def test_a_gpu_s_is_bounded_by_its_memory(num_ids: int, memory_gib: int, wanted: int) -> None:
    assert automatic_chunk(num_ids, memory_gib * GIB) == wanted
