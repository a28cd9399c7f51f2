"""Progress: bars at a terminal, lines in a log."""

from __future__ import annotations

import io
import sys

import pytest
from tqdm import tqdm

from shared.progress import LogLines, by_examples, progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar_that_is_drawn_over() -> None:
    file = Terminal()
    assert list(progress(range(3), file=file, desc="reading")) == [0, 1, 2]
    assert file.getvalue().startswith("\rreading")


def test_a_log_keeps_nothing_of_what_is_quickly_done() -> None:
    file = io.StringIO()
    assert list(progress(range(3), file=file, desc="reading")) == [0, 1, 2]
    assert file.getvalue() == ""


def test_batches_are_counted_in_examples_of_a_known_number(monkeypatch: pytest.MonkeyPatch) -> None:
    file = Terminal()
    monkeypatch.setattr(sys, "stderr", file)
    done = list(by_examples(iter([([0, 1], "a"), ([2], "b")]), total=3, desc="teacher"))
    assert done == [([0, 1], "a"), ([2], "b")]
    assert "0/3" in file.getvalue()


def steps(mininterval: float) -> list[str]:
    """What a log holds of three steps, with a message after each."""
    file = io.StringIO()
    with LogLines(total=3, file=file, desc="steps", mininterval=mininterval, miniters=1, delay=1e-9) as bar:
        for loss in (3, 2, 1):
            bar.set_postfix(loss=loss, refresh=False)
            bar.update()
            tqdm.write("validated", file=file)
    assert "\r" not in file.getvalue()
    return file.getvalue().splitlines()


def test_a_log_has_lines_as_often_as_asked_and_one_at_the_end() -> None:
    lines = steps(mininterval=0)
    for number, loss in ((1, 3), (2, 2), (3, 1)):
        assert any(f"{number}/3" in line and f"loss={loss}" in line for line in lines)
    assert lines.count("validated") == 3


def test_messages_in_between_bring_no_lines_of_their_own() -> None:
    *lines, last = steps(mininterval=1000)
    assert lines == ["validated"] * 3
    assert "3/3" in last
