"""The command ``python -m shared.phantom OUT``: draws a VQA set."""

from __future__ import annotations

import time

import click

from shared.cli import HomePath, run


@click.command(name="phantom")
@click.argument("out", type=HomePath(file_okay=False))
@click.option(
    "--train", default=480, show_default=True, help="Pictures for training; each has five questions."
)
@click.option("--validation", default=64, show_default=True, help="Pictures for validation.")
@click.option("--test", default=64, show_default=True, help="Pictures for testing.")
@click.option("--seed", default=0, show_default=True, help="Another seed draws other pictures.")
@click.option("--size", default=128, show_default=True, help="Width and height of a picture in pixels.")
@click.option(
    "--mistaken",
    default=0.0,
    show_default=True,
    help="Share of the short training answers that are another picture's, as annotators err.",
)
def main(out: str, train: int, validation: int, test: int, seed: int, size: int, mistaken: float) -> None:
    """Draws medical-looking pictures with questions into the folder OUT, as Parquet files."""
    from shared.phantom.dataset import SPLITS, write_dataset  # what takes a moment: by now Ctrl-C is answered
    from shared.phantom.questions import QUESTIONS_PER_PICTURE

    pictures = dict(zip(SPLITS, (train, validation, test), strict=True))
    begun = time.perf_counter()
    if not write_dataset(out, pictures=pictures, seed=seed, size=size, mistaken=mistaken):
        click.echo(f"{out}: already drawn with these arguments")
        return
    seconds = time.perf_counter() - begun
    numbers = ", ".join(f"{split} {number}" for split, number in pictures.items())
    total = sum(pictures.values()) * QUESTIONS_PER_PICTURE
    click.echo(f"{out}: pictures {numbers}; {total:,} questions in all; {seconds:.1f} s")


if __name__ == "__main__":
    run(main)
