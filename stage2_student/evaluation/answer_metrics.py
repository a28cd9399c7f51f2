"""How good an answer is, and how sure one can be of a mean: exact match, token F1, ROUGE-L, bootstrap intervals.

    exact_match("Axial.", "axial"), token_f1("axial CT", "CT"), rouge_l("a small mass", "a mass")

Texts are compared without case, punctuation and spaces, whatever their script.  Signs are no punctuation: "HER2+"
is the opposite of "HER2-", and "< 5 mm" of "> 5 mm".  ROUGE-L is the F-measure of the longest common subsequence of
words, as the package rouge-score computes it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

RESAMPLES = 1000
CONFIDENCE = 0.95
MINUS = str.maketrans("\u2212\u2013", "--")  # typeset: a sign of its own, or an en dash
_NO_ZERO = re.compile(r"(?<![\w.])\.(?=\d)")  # ".5" is no "5"


def normalize(text: str) -> str:
    """Lower case; words of letters, digits and marks of any script, and signs alone; single spaces."""
    plain = unicodedata.normalize("NFKC", text).casefold().translate(MINUS)
    padded = f" {_NO_ZERO.sub('0.', plain)} "
    return " ".join("".join(_kept(*padded[i - 1 : i + 2]) for i in range(1, len(padded) - 1)).split())


def _kept(before: str, character: str, after: str) -> str:
    """A character between its neighbours, or what stands in its place."""
    category = unicodedata.category(character)
    if category[0] in "LMN":  # \w leaves out marks, without which words of many scripts fall apart
        return character
    if category == "Sm" or character == "%":
        return f" {character} "
    if character == "-" and after.isdigit() and not before.isalnum():  # not in "5-10"
        return " - "
    is_decimal_point = character == "." and before.isdigit() and after.isdigit()
    return character if is_decimal_point else " "


def exact_match(answer: str, reference: str) -> bool:
    return normalize(answer) == normalize(reference)


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over words, each counted as often as it occurs in both.

    Source   Rajpurkar et al. 2016 (SQuAD, arXiv 1606.05250), without its dropping of English articles
    """
    ours, theirs = normalize(answer).split(), normalize(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs))


def rouge_l(answer: str, reference: str) -> float:
    """Source   Lin 2004, ROUGE; the package rouge-score"""
    if not normalize(answer) or not normalize(reference):
        return float(normalize(answer) == normalize(reference))
    return float(_scorer().score(reference, answer)["rougeL"].fmeasure)


class _Words:
    """rouge-score's own tokenizer knows ASCII alone."""

    def tokenize(self, text: str) -> list[str]:
        return normalize(text).split()


@cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_Words())


@dataclass(frozen=True)
class Interval:
    """A mean over answers and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    count: int

    def text(self) -> str:
        """In per cent."""
        return f"{self.mean:.1%} ({100 * self.low:.1f}-{100 * self.high:.1f})"


def mean_interval(values: Sequence[float], groups: Sequence[Hashable], *, seed: int = 0) -> Interval | None:
    """The mean, and percentiles of it over 1,000 resamples; None where there is nothing to average.

    groups  of the values: what is drawn together.  Questions about one picture are no independent trials.
    Holds   the same values and groups give the same interval; it holds the mean
    """
    if not len(values):
        return None
    number = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    index = np.array([number[group] for group in groups])
    sums_G = np.bincount(index, weights=np.asarray(values, dtype=float))
    counts_G = np.bincount(index)
    # Multinomial counts: how often each group was drawn.
    generator = np.random.default_rng(seed)
    drawn = (
        generator.multinomial(len(sums_G), np.full(len(sums_G), 1 / len(sums_G))) for _ in range(RESAMPLES)
    )
    means = [float(times_G @ sums_G / (times_G @ counts_G)) for times_G in drawn]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    mean = float(np.mean(values))
    return Interval(mean, min(float(low), mean), max(float(high), mean), len(values))
