"""The writer thread: everything arrives in order, and its death is the run's death."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from stage1_teacher.capturing.handover import BackgroundWriter, HostCopy


def test_items_are_written_in_order_before_the_block_ends() -> None:
    written: list[int] = []
    with BackgroundWriter(written.append, max_pending=2) as writer:
        for item in range(50):
            writer.put(item)
    assert written == list(range(50))


def fail_at_three(item: int) -> None:
    if item == 3:
        raise OSError(28, "No space left on device")


def test_error_in_the_thread_reaches_the_one_who_puts() -> None:
    def put_many() -> None:
        with BackgroundWriter(fail_at_three, max_pending=1) as writer:
            for item in range(1000):
                writer.put(item)

    with pytest.raises(OSError, match="No space left"):
        put_many()


def test_error_on_the_last_item_reaches_the_end_of_the_block() -> None:
    with (
        pytest.raises(OSError, match="No space left"),
        BackgroundWriter(fail_at_three, max_pending=9) as writer,
    ):
        writer.put(3)


def test_put_does_not_hang_when_the_thread_dies_while_the_queue_is_full() -> None:
    gate = threading.Event()

    def wait_then_die(item: int) -> None:
        gate.wait()
        raise RuntimeError("died")

    def put_three() -> None:
        with BackgroundWriter(wait_then_die, max_pending=1) as writer:
            writer.put(0)
            writer.put(1)
            threading.Timer(0.1, gate.set).start()
            writer.put(2)

    with pytest.raises(RuntimeError, match="died"):
        put_three()


def test_an_exception_in_the_block_drops_what_waits_and_ends_the_thread() -> None:
    written: list[int] = []

    def slow(item: int) -> None:
        time.sleep(0.05)
        written.append(item)

    before = threading.active_count()

    def put_and_fail() -> None:
        with BackgroundWriter(slow, max_pending=100) as writer:
            for item in range(100):
                writer.put(item)
            raise KeyError

    with pytest.raises(KeyError):
        put_and_fail()
    assert len(written) < 100
    assert threading.active_count() == before


def test_the_queue_is_bounded() -> None:
    gate = threading.Event()
    put = 0

    def wait(item: int) -> None:
        gate.wait()

    with BackgroundWriter(wait, max_pending=3) as writer:
        threading.Timer(0.3, gate.set).start()
        for _ in range(10):
            writer.put(0)
            put += 1
            if not gate.is_set():
                assert put <= 3 + 1  # three wait, one is being written


def test_the_thread_works_on_the_rank_s_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[tuple[str, int]] = []
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 3)
    monkeypatch.setattr(
        "torch.cuda.set_device", lambda device: chosen.append((threading.current_thread().name, device))
    )
    with BackgroundWriter[int](lambda item: None, max_pending=1) as writer:
        writer.put(0)
    assert chosen == [("cache-writer", 3)]


def test_a_host_copy_of_host_tensors_is_the_tensors() -> None:
    tensor = torch.arange(3)
    assert HostCopy({"a": tensor}).wait()["a"] is tensor
