"""Fixtures that several test modules share: small real models and a small data set, made once a session."""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the first import of a Hugging Face library
# Before the first import of torch.  Ranks are forked here, and a fork of a process whose OpenMP threads have worked
# hangs in its first parallel region; and on a CPU the last bit of a sum changes with the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import hypothesis
import pytest
import torch
import torch.distributed as dist
from forks import settle_thread_pools
from samples import ANSWERS, PLAIN_CHAT, QUESTIONS, make_examples, write_vqa_folder
from tokenizers import AddedToken
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
)

from shared.data.processing import ExampleProcessor, open_processor
from shared.data.rows import Example
from shared.recipes import DataConfig, Recipe
from shared.small_models import make_small_model, train_tokenizer

settle_thread_pools()

# How long an example takes says more about what else the machine does than about the code.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


def pytest_configure(config: pytest.Config) -> None:
    """The tests run as on a machine without a GPU, unless those that need one are asked for (``-m gpu``).

    Autograd counts the devices at its first backward pass, and starts a thread for each; a process with such threads
    cannot fork ranks that run backward.  Counted now there are none.  Later there may be one that does not exist: a
    CUDA build feigns it for fake tensors.

    Nor may another thread hold a lock when ranks are forked: tqdm's monitor takes the one of all bars now and then.

    A shell has what it starts in the background ignore Ctrl-C.  Commands that tests start would inherit that.
    """
    tqdm.monitor_interval = 0
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.ones((), requires_grad=True).backward()


def pytest_unconfigure() -> None:
    """At the end all may go (``_what_is_there_stays``): libraries tell what they hold then as leaks."""
    gc.unfreeze()


LONGEST = (
    "test_families.py",
    "test_end_to_end.py",
    "test_documents.py",
    "test_torture.py",
    "test_bench_gpu.py",
    "test_kd_loss_triton.py",
    "test_rounds.py",
    "test_stopping.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first, so that none of them is left for one process at the end."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(rank)))


def _named_alike(init: Callable[..., None]) -> Callable[..., None]:
    """The first group of a process is always called the same.

    torch keeps device meshes, and finds their group by its name; it counts on where a group before was not put away
    in order, as after a test of failures.
    """

    @functools.wraps(init)
    def wrapped(*arguments: Any, **options: Any) -> None:
        dist.distributed_c10d._world.group_count = 0
        init(*arguments, **options)

    return wrapped


dist.init_process_group = _named_alike(dist.init_process_group)


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes a package look as if it were not installed."""

    def hide_package(name: str) -> None:
        for loaded in [name, *(module for module in sys.modules if module.startswith(f"{name}."))]:
            monkeypatch.setitem(sys.modules, loaded, None)

    return hide_package


@pytest.fixture(scope="module", autouse=True)
def _what_is_there_stays() -> None:
    """No collection of garbage looks again at what was there before a file's first test: modules, above all.

    Each run and each group of ranks collects several times; among all of that it took as long as the run itself.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keeps what ``datasets`` writes out of the home folder."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets_cache")
    datasets.disable_progress_bars()


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer and chat template; 384 ids at most."""
    return train_tokenizer([*QUESTIONS, *ANSWERS] * 4, tmp_path_factory.mktemp("tokenizer"), vocab_size=384)


@pytest.fixture(scope="session")
def student_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A Qwen3.5 of 0.2 M parameters: one linear and one full attention layer, tied embeddings."""
    return make_small_model(
        tmp_path_factory.mktemp("models") / "student",
        tokenizer=tokenizer_folder,
        hidden_size=64,
        num_layers=2,
        vision_hidden_size=32,
        vision_depth=1,
        seed=1,
    )


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A larger Qwen3.5 of the same tokenizer, embeddings and head apart."""
    return make_small_model(
        tmp_path_factory.mktemp("models") / "teacher",
        tokenizer=tokenizer_folder,
        hidden_size=128,
        num_layers=3,
        vision_hidden_size=64,
        vision_depth=1,
        seed=2,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A LLaVA without weights: another processor, another image processor, pictures of one size."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    options = {
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
    }
    template = PLAIN_CHAT.replace("<|image_pad|>", "<image>")
    LlavaProcessor(images, tokenizer, chat_template=template, **options).save_pretrained(folder)
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlavaConfig(
        vision_config=CLIPVisionConfig(**tiny, image_size=28, patch_size=14, projection_dim=32),
        text_config=LlamaConfig(**tiny, num_key_value_heads=2, vocab_size=len(tokenizer) + 7),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def examples() -> list[Example]:
    """Twelve examples with pictures of three sizes."""
    return make_examples(12)


@pytest.fixture(scope="session")
def vqa_folder(tmp_path_factory: pytest.TempPathFactory, examples: list[Example]) -> Path:
    """A Parquet folder with MedPix's columns: 12 training rows, 4 for validation."""
    return write_vqa_folder(tmp_path_factory.mktemp("vqa"), num_train=len(examples), num_validation=4)


@pytest.fixture(scope="session")
def mixed_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations in JSONL, 12 for training and 4 for validation; those of an even number are text alone."""
    folder = tmp_path_factory.mktemp("mixed")
    for split, rows in (("train", make_examples(12)), ("validation", make_examples(16)[12:])):
        lines = []
        for row in rows:
            name = f"{split}-{row.index}.png"
            (folder / name).write_bytes(row.images[0])
            shown = [{"type": "image", "image": name}] if row.index % 2 else []
            asked = {"role": "user", "content": [*shown, {"type": "text", "text": row.question}]}
            lines.append(json.dumps({"messages": [asked, {"role": "assistant", "content": row.answer}]}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def data_config(vqa_folder: Path) -> DataConfig:
    return DataConfig(source=str(vqa_folder), max_answer_tokens=64)


@pytest.fixture(scope="session")
def processor(student_folder: Path, data_config: DataConfig) -> ExampleProcessor:
    """The example processor of the small models."""
    return open_processor(str(student_folder), data_config)


@pytest.fixture(scope="session")
def teacher_cache(
    tmp_path_factory: pytest.TempPathFactory, vqa_folder: Path, teacher_folder: Path, student_folder: Path
) -> Path:
    """A cache of the small teacher's targets for every row of the small data set."""
    from shared.recipes.files import validate_tree
    from shared.runtime import distributed
    from shared.stopping import StopRequest
    from stage1_teacher.capture import capture

    path = tmp_path_factory.mktemp("caches") / "cache"
    tree = {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": str(path), "num_workers": 0, "temperatures": [1.0, 2.0]},
        "student": {"model": str(student_folder)},
        "optimization": {"max_steps": 1},
        "run": {"name": "unused"},
    }
    with distributed(device="cpu") as world:
        assert capture(validate_tree(Recipe, tree, origin="fixture"), world, StopRequest()) == 0
    return path


@pytest.fixture(scope="session")
def distillation_tree(
    vqa_folder: Path, teacher_folder: Path, student_folder: Path, teacher_cache: Path
) -> dict[str, Any]:
    """A recipe of four steps of the small student with the small cache; whoever uses it adds a ``run``."""
    return {
        "data": {"source": str(vqa_folder), "max_answer_tokens": 64},
        "teacher": {"model": str(teacher_folder), "dtype": "float32"},
        "cache": {"path": str(teacher_cache), "temperatures": [1.0, 2.0]},
        "student": {"model": str(student_folder), "compute_dtype": "float32"},
        "optimization": {"global_batch_size": 4, "microbatch_size": 2, "max_steps": 4, "learning_rate": 1e-2},
    }


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """A server on this machine that speaks the S3 protocol."""
    from moto.server import ThreadedMotoServer  # Flask, which few tests need

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()
