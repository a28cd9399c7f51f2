"""A minute of ``make torture``: each campaign has its first cases, and none of them is lost, wrong or hung."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torture.cases import Campaign, CannotRunError, Outcome, Result, run_campaign, table

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_hard_conditions_by_chance() -> None:
    """A seed that does not change: what fails here fails again."""
    command = [sys.executable, "-m", "tests.torture", "--minutes=1", "--seed=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    assert "seed 1" in done.stdout


def test_a_case_that_fails_is_told_with_the_command_that_repeats_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def case(number: int, chance: object, folder: Path) -> Result:
        return Result(Outcome.WRONG if number == 2 else Outcome.RIGHT, "three is two", "said", cases=5)

    tally = run_campaign(Campaign("sums", case, share=1, least=4), seed=7, seconds=0, folder=tmp_path)
    assert (tally.counts[Outcome.RIGHT], tally.counts[Outcome.WRONG]) == (15, 5)
    said = capsys.readouterr().out
    assert "WRONG: three is two" in said
    assert "python -m tests.torture --seed=7 --only sums --case=2" in said
    assert table([tally])[1].split()[:7] == ["sums", "20", "0", "15", "0", "5", "0"]
    assert not list(tmp_path.iterdir())


def test_a_condition_that_cannot_be_made_is_skipped_by_name(tmp_path: Path) -> None:
    def case(number: int, chance: object, folder: Path) -> Result:
        raise CannotRunError("nothing can be mounted")

    tally = run_campaign(Campaign("disks", case, share=1), seed=1, seconds=9, folder=tmp_path)
    assert "skipped: nothing can be mounted" in "\n".join(table([tally]))


def test_an_unknown_campaign_is_refused() -> None:
    command = [sys.executable, "-m", "tests.torture", "--only", "storms"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'storms'" in done.stderr
