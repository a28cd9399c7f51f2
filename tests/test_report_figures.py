"""What figures of a report are drawn from: positions of a cache, calibration, axes, lines of a sweep."""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from shared.cache import Row
from shared.recipes.policies import Policy, Random, Threshold, TopK
from shared.reports.figures import COLORS, Drawing, Series, save_png, set_log, spans_much, svg, swatch
from shared.reports.recipe import differences
from shared.reports.reliability import ENOUGH, NUM_BINS, Reliability, draw_reliability
from shared.reports.text import label, shorten, token_text, visible
from shared.sparse import SparseTargets, sparsify
from stage1_teacher.inspection.plots import by_kind, by_place
from stage1_teacher.inspection.positions import Positions, positions_of, top_entries
from stage2_student.evaluation.compare import results
from stage2_student.evaluation.curves import calibration_drawing, loss_drawings
from stage2_student.evaluation.group_curves import group_drawings
from stage2_student.evaluation.questions import Question, spread_evenly
from stage2_student.evaluation.run_records import RunRecord
from stage2_student.evaluation.sweep_curves import sweep_drawings
from stage2_student.training.reliability import (
    reliability_sums,
    student_reliability,
    teacher_reliability,
    tells_probabilities,
)

V = 50


@pytest.fixture
def axes() -> Any:
    figure = importlib.import_module("matplotlib.figure")
    return figure.Figure().add_subplot()


# --- positions of a cache --------------------------------------------------------------------------------


def teacher_rows(
    policy: Policy, lengths: Sequence[int], *, seed: int = 0
) -> tuple[list[Row], SparseTargets, torch.Tensor, torch.Tensor]:
    """Rows of a made-up teacher, their targets, the whole log-probs (N, V) and labels (N,)."""
    generator = torch.Generator().manual_seed(seed)
    logprobs_NV = (4 * torch.randn(sum(lengths), V, generator=generator)).log_softmax(-1)
    labels_N = torch.multinomial(logprobs_NV.exp(), 1, generator=generator)[:, 0]
    seeds = torch.randint(2**62, (sum(lengths),), generator=generator)
    targets = sparsify(logprobs_NV, policy, seeds=seeds)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1).double()
    ce_N = -logprobs_NV[torch.arange(len(labels_N)), labels_N].double()
    rows = []
    for start, end in itertools.pairwise(np.cumsum([0, *lengths]).tolist()):
        rows.append(
            Row(
                key=bytes(16),
                answer_ids=labels_N[start:end].int().numpy(),
                num_entries=0,
                ce_sum=float(ce_N[start:end].sum()),
                entropy_sums=np.array([float(entropy_N[start:end].sum())]),
                payload=b"",
            )
        )
    return rows, targets, logprobs_NV, labels_N


@pytest.mark.parametrize("policy", [Threshold(tau=1e-6), TopK(k=V)])
def test_positions_that_were_kept_whole_are_exact(policy: Policy) -> None:
    rows, targets, logprobs_NV, labels_N = teacher_rows(policy, [3, 1, 7])
    found = positions_of(rows, targets)
    assert found is not None
    probs_NV = logprobs_NV.exp()
    index = torch.arange(len(labels_N))
    assert found.row_N.tolist() == [0] * 3 + [1] + [2] * 7
    assert found.place_N.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(found.entropy_N, -(probs_NV * logprobs_NV).sum(-1), rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(found.ce_N, -logprobs_NV[index, labels_N], rtol=5e-3, atol=5e-3)
    np.testing.assert_allclose(found.top_prob_N, probs_NV.amax(-1), rtol=2e-3)
    assert found.is_label_N.tolist() == (probs_NV.argmax(-1) == labels_N).tolist()


@pytest.mark.parametrize("policy", [Threshold(tau=0.05), TopK(k=3)])
def test_of_what_was_cut_every_row_s_sum_is_exact_and_a_position_near(policy: Policy) -> None:
    rows, targets, logprobs_NV, _ = teacher_rows(policy, [40, 1, 25])
    found = positions_of(rows, targets)
    assert found is not None
    for row, entropy, ce in zip(
        rows,
        np.bincount(found.row_N, found.entropy_N),
        np.bincount(found.row_N, found.ce_N),
        strict=True,
    ):
        assert entropy == pytest.approx(row.entropy_sums[0], rel=1e-6)
        assert ce == pytest.approx(row.ce_sum, rel=1e-9)
    exact = -(logprobs_NV.exp() * logprobs_NV).sum(-1).numpy()
    assert np.abs(found.entropy_N - exact).mean() < 0.15 * exact.mean()
    assert (found.entropy_N >= 0).all()


def test_positions_need_temperature_one() -> None:
    rows, targets, logprobs_NV, _ = teacher_rows(TopK(k=3), [4])
    warm = sparsify(logprobs_NV, TopK(k=3), temperatures=(2.0,), seeds=torch.zeros(4, dtype=torch.int64))
    assert positions_of(rows, warm) is None
    assert positions_of([], targets.slice(0, 0)) is not None


def test_the_likeliest_entries_are_those_of_the_distribution() -> None:
    _, targets, logprobs_NV, _ = teacher_rows(TopK(k=5), [6])
    probs_N, ids_N = targets.likeliest()
    values_NK, ids_NK = logprobs_NV.exp().topk(3)
    assert ids_N.tolist() == ids_NK[:, 0].tolist()
    torch.testing.assert_close(probs_N, values_NK[:, 0], rtol=2e-3, atol=0)
    assert [[number for number, _ in entries] for entries in top_entries(targets, 3)] == ids_NK.tolist()


def test_shares_of_draws_at_another_temperature_are_no_probabilities() -> None:
    _, _, logprobs_NV, _ = teacher_rows(TopK(k=5), [4])
    seeds = torch.arange(4)
    for policy, temperatures, told in (
        (Random(draws=20), (2.0,), False),
        (Random(draws=20), (1.0,), True),
        (Random(draws=20), (1.0, 2.0), True),
        (Threshold(tau=1 / 64), (2.0,), True),
    ):
        targets = sparsify(logprobs_NV, policy, temperatures=temperatures, seeds=seeds)
        assert tells_probabilities(targets) == told, (policy, temperatures)


def test_of_equals_the_lowest_id_is_likeliest_and_nothing_kept_is_minus_one() -> None:
    targets = SparseTargets(
        offsets=torch.tensor([0, 3, 3, 4]),
        ids=torch.tensor([4, 7, 9, 2], dtype=torch.int32),
        logprobs=torch.tensor([-2.0, -1.0, -1.0, -0.5]).half(),
        policy=TopK(k=3),
        temperatures=(1.0,),
        log_normalizers=torch.zeros(3, 0),
        entropy=torch.zeros(3, 1),
        draw_counts=torch.zeros(0, dtype=torch.int32),
    )
    probs_N, ids_N = targets.likeliest()
    assert ids_N.tolist() == [7, -1, 2]
    torch.testing.assert_close(probs_N, torch.tensor([math.exp(-1), 0.0, math.exp(-0.5)]))
    empty_probs, empty_ids = targets.slice(0, 0).likeliest()
    assert (len(empty_probs), len(empty_ids)) == (0, 0)


def a_few_positions() -> Positions:
    return Positions(
        row_N=np.repeat([0, 1, 2], [2, 3, 1]),
        place_N=np.array([0, 1, 0, 1, 2, 0]),
        entropy_N=np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]),
        ce_N=np.array([2.0, 2.0, 2.0, 2.0, 2.0, 5.0]),
        top_prob_N=np.full(6, 0.5),
        is_label_N=np.zeros(6, bool),
    )


def test_means_by_place_and_by_kind_are_over_positions(axes: Any) -> None:
    drawing = by_place(a_few_positions())
    drawing.draw(axes)
    entropy, ce = (line.get_ydata().tolist() for line in axes.lines)
    assert entropy == pytest.approx([10 / 3])  # one place alone has as many answers as the fullest one
    assert ce == pytest.approx([3.0])
    assert "nats per position" in axes.get_ylabel()
    kinds = by_kind(["a", "b", "a"], a_few_positions())
    assert kinds.told == "a: entropy 3.00, cross-entropy 3.00; b: entropy 4.00, cross-entropy 2.00"


# --- calibration -----------------------------------------------------------------------------------------


def test_reliability_against_counting_by_hand() -> None:
    generator = torch.Generator().manual_seed(3)
    probs = torch.rand(500, generator=generator)
    is_label = torch.rand(500, generator=generator) < probs
    found = Reliability.of(probs.double().numpy(), is_label.numpy())
    slow = np.zeros((3, NUM_BINS))
    for prob, right in zip(probs.tolist(), is_label.tolist(), strict=True):
        slow[:, min(int(prob * NUM_BINS), NUM_BINS - 1)] += (1, prob, right)
    np.testing.assert_allclose([found.count, found.confidence, found.right], slow)
    np.testing.assert_allclose(reliability_sums(probs, is_label).numpy(), slow, rtol=1e-6)
    gaps = [abs(c - r) for c, r in zip(slow[1], slow[2], strict=True)]
    assert found.error == pytest.approx(sum(gaps) / 500)


def test_reliability_of_parts_adds_up_and_survives_json() -> None:
    probs, is_label = np.linspace(0, 1, 101), np.arange(101) % 2 == 0
    whole = Reliability.of(probs, is_label)
    parts = Reliability.of(probs[:40], is_label[:40]) + Reliability.of(probs[40:], is_label[40:])
    np.testing.assert_allclose(parts.confidence, whole.confidence)
    assert parts.count == whole.count
    assert Reliability.read(whole.to_json()) == whole
    assert whole.num_positions == 101
    for damaged in (
        None,
        1,
        {},
        {"count": [1], "confidence": [1], "right": [1]},
        whole.to_json() | {"right": [None]},
    ):
        assert Reliability.read(damaged) is None


@pytest.mark.parametrize("chunk", [1, 2**24])
def test_a_student_s_reliability_against_its_whole_logits(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shared.models.vlm import Head

    monkeypatch.setattr("stage2_student.training.reliability.MAX_LOGITS", chunk)
    torch.manual_seed(0)
    head = Head(torch.nn.Linear(6, V), scale=2.0, softcap=3.0)
    hidden, labels = torch.randn(30, 6), torch.randint(V, (30,))
    with torch.no_grad():
        found = student_reliability(hidden, head, labels)
        probs_N, ids_N = head.logits(hidden).softmax(-1).max(-1)
    expected = Reliability.of(probs_N.double().numpy(), (ids_N == labels).numpy())
    np.testing.assert_allclose(found[0].numpy(), expected.count)
    np.testing.assert_allclose(found[1:].numpy(), [expected.confidence, expected.right], rtol=1e-5)
    assert student_reliability(hidden[:0], head, labels[:0]).sum() == 0


def test_a_teacher_s_reliability_is_that_of_its_kept_entries() -> None:
    rows, targets, _, labels_N = teacher_rows(TopK(k=5), [20])
    positions = positions_of(rows, targets)
    assert positions is not None
    expected = Reliability.of(positions.top_prob_N, positions.is_label_N)
    np.testing.assert_allclose(teacher_reliability(targets, labels_N)[2].numpy(), expected.right)


def test_bins_with_few_positions_are_not_drawn(axes: Any) -> None:
    probs = np.repeat([0.15, 0.95], [ENOUGH - 1, ENOUGH])
    found = Reliability.of(probs, np.ones(len(probs)))
    drawing = draw_reliability({"student": (found, Series(0)), "teacher": (found, None)})
    drawing.draw(axes)
    diagonal, *lines = axes.lines
    assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
    assert [line.get_xydata().tolist() for line in lines] == [[[pytest.approx(0.95), 1.0]]] * 2
    assert drawing.told is not None
    assert "39 positions" in drawing.told


# --- runs ------------------------------------------------------------------------------------------------


def a_run(name: str, records: Sequence[dict[str, Any]] = (), **changed: Any) -> RunRecord:
    values: dict[str, Any] = {
        "name": name,
        "path": Path(name),
        "is_finished": True,
        "num_steps": 100,
        "settings": {"loss.kd_ratio": 0.5, "optimization.learning_rate": 1e-3, "student.model": "a"},
        "losses": {"loss": 1.0, "ce_loss": 1.0, "kl": 0.5},
        "teacher_ce": None,
        "answered": (),
        "asked": None,
        "positions_per_s": 1.0,
        "step_s": 1.0,
        "peak_memory_gib": 1.0,
        "num_epochs": 1.0,
        "reading_s": 0.0,
        "caches": (),
        "is_mix": False,
        "records": tuple(records),
    }
    return RunRecord(**(values | changed))


def falling(start: float, end: float) -> list[dict[str, Any]]:
    """A loss that falls by halves: 100 steps, a validation after every tenth."""
    value = {step: end + (start - end) * 0.5 ** (step / 10) for step in range(101)}
    steps = [{"event": "step", "step": step, "ce_loss": value[step]} for step in range(1, 101)]
    last = {"event": "validation"}
    return steps + [last | {"step": step, "ce_loss": value[step]} for step in range(0, 101, 10)]


def test_a_start_that_dwarfs_the_rest_makes_the_axis_logarithmic_and_shows_the_second_half_again(
    axes: Any,
) -> None:
    drawn = loss_drawings([a_run("student", falling(7.0, 0.6), teacher_ce=0.4)])
    assert list(drawn) == ["ce_loss", "ce_loss_late"]
    drawn["ce_loss"].draw(axes)
    assert axes.get_yscale() == "log"
    assert "log" in axes.get_ylabel()
    assert "nats per position" in axes.get_ylabel()
    ticks = [tick for tick in axes.yaxis.get_major_locator()() if 0.5 <= tick <= 7]
    assert len(ticks) >= 3
    figure = axes.figure
    figure.clear()
    late = figure.add_subplot()
    drawn["ce_loss_late"].draw(late)
    assert late.get_yscale() == "linear"
    assert min(line.get_xdata()[0] for line in late.lines[:2]) == 50
    assert late.get_ylim()[1] < 1.2
    assert drawn["ce_loss"].told == "student: 7.000 at step 0, 0.606 at step 100"


def test_a_loss_that_hardly_moves_has_one_linear_figure(axes: Any) -> None:
    drawn = loss_drawings([a_run("student", falling(1.0, 0.6))])
    assert list(drawn) == ["ce_loss"]
    drawn["ce_loss"].draw(axes)
    assert axes.get_yscale() == "linear"


def test_the_teacher_s_ce_is_a_position_of_its_own_where_a_run_has_it_so(axes: Any) -> None:
    """A student with another tokenizer divides it by its own positions."""
    settings = {"loss.kd_ratio": 0.5, "teacher.model": "large"}
    covered = {"event": "validation", "step": 100, "ce_loss": 0.6, "shared_positions": 0.7}
    losses = {"ce_loss": 1.0, "kl": 0.5, "soft_ce": None}
    known = {"settings": settings, "losses": losses}
    other = a_run("other", [*falling(2.0, 0.6), covered], teacher_ce=0.3, **known)
    plain = a_run("plain", falling(2.0, 0.6), teacher_ce=0.4, **known)
    for runs, ce in (([other, plain], 0.4), ([plain, other], 0.4), ([other], 0.3)):
        head, rows = results(runs)
        assert rows[-1][head.index("CE")] == f"{ce:.4f}"
        axes.clear()
        loss_drawings(runs)["ce_loss"].draw(axes)
        assert set(axes.lines[-1].get_ydata()) == {ce}


def test_validation_does_not_hide_training_and_the_teacher_is_a_line(axes: Any) -> None:
    loss_drawings([a_run("student", falling(2.0, 0.6), teacher_ce=0.4)])["ce_loss"].draw(axes)
    training, validation, teacher = axes.lines
    assert training.get_marker() == "None"
    assert validation.get_markerfacecolor() == "none"
    assert validation.get_color() == training.get_color()
    assert (set(teacher.get_ydata()), teacher.get_linestyle()) == ({0.4}, "--")
    assert [text.get_text() for text in axes.texts] == ["teacher 0.400"]


@pytest.mark.parametrize("num_validations", [1, 2, 12, 13, 14, 26, 100, 1000])
def test_a_long_curve_has_few_marks_and_the_last_validation_one(axes: Any, num_validations: int) -> None:
    records = [{"event": "validation", "step": n, "ce_loss": 1.0} for n in range(num_validations)]
    loss_drawings([a_run("student", records)])["ce_loss"].draw(axes)
    (validation,) = axes.lines
    first, every = validation.get_markevery()
    marked = validation.get_xdata()[first::every]
    assert min(num_validations, 6) <= len(marked) <= 12
    assert marked[-1] == num_validations - 1


def test_runs_of_before_have_no_calibration_and_no_teacher() -> None:
    old = a_run("old", [{"event": "validation", "step": 1, "ce_loss": 1.0}])
    assert calibration_drawing([old]) is None
    found = Reliability.of(np.full(50, 0.55), np.ones(50)).to_json()
    new = a_run(
        "new", [{"event": "validation", "step": 1, "reliability": found, "teacher_reliability": found}]
    )
    drawing = calibration_drawing([old, new])
    assert drawing is not None
    assert drawing.told is not None
    assert drawing.told.startswith("new: calibration error 45.0%")
    assert "teacher: calibration error" in drawing.told


def grouped(kl: list[float] | None, positions: list[int]) -> dict[str, Any]:
    means = {"names": ["site", "plane"][: len(positions)], "positions": positions, "ce": [1.0, 2.0]}
    by_kind = means if kl is None else means | {"kl": kl}
    return {"event": "validation", "step": 1, "by_place": by_kind | {"names": [1, 2]}, "by_kind": by_kind}


def test_a_student_is_shown_by_place_and_kind_where_its_log_tells(axes: Any) -> None:
    old = a_run("old", [{"event": "validation", "step": 1, "by_kind": "rubbish", "by_place": {"names": 3}}])
    plain = a_run("plain", [grouped(None, [30, 40])])
    new = a_run("new", [grouped([0.25, 0.5], [30, 40])])
    assert group_drawings([old]) == []
    assert [one.title.split(",")[0] for one in group_drawings([plain])] == [
        "Cross-entropy with the labels"
    ] * 2
    places, kinds = group_drawings([old, plain, new])
    assert (places.title, kinds.title) == (
        "KL from the teacher, by position in the answer",
        "KL from the teacher, by kind of question",
    )
    assert kinds.told == "new: largest at plane, 0.500 nats"
    places.draw(axes)
    assert axes.lines[0].get_ydata().tolist() == [0.25, 0.5]
    assert axes.lines[0].get_color() == Series(2).color
    kinds_axes = axes.figure.add_subplot()
    kinds.draw(kinds_axes)
    assert [tick.get_text() for tick in kinds_axes.get_yticklabels()] == ["plane", "site"]  # by positions


def test_groups_of_few_positions_are_left_out() -> None:
    assert group_drawings([a_run("few", [grouped([0.25, 0.5], [3, 4])])]) == []


def sweep_run(ratio: float, rate: float, ce: float, **changed: Any) -> RunRecord:
    settings = {"loss.kd_ratio": ratio, "optimization.learning_rate": rate}
    losses = {"loss": ce, "ce_loss": ce, "kl": None}
    return a_run(f"{ratio}-{rate}", settings=settings, losses=losses, **changed)


def test_a_sweep_is_one_line_for_a_combination_of_the_other_settings_in_order(axes: Any) -> None:
    runs = [
        sweep_run(1.0, 1e-3, 3.0),
        sweep_run(0.0, 1e-3, 1.0),
        sweep_run(0.5, 1e-3, 2.0),
        sweep_run(0.0, 1e-1, 5.0),
        sweep_run(0.5, 1e-1, 4.0),
        sweep_run(1.0, 1e-1, 9.0, is_finished=False),
    ]
    drawn = sweep_drawings(runs)
    assert [one.title for one in drawn] == [
        "CE against loss.kd_ratio",
        "CE against optimization.learning_rate",
    ]
    drawn[0].draw(axes)
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [[0.0, 1.0], [0.5, 2.0], [1.0, 3.0]],
        [[0.0, 5.0], [0.5, 4.0]],
    ]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "learning_rate 0.001",
        "learning_rate 0.1",
    ]
    assert axes.get_xlabel() == "loss.kd_ratio"
    figure = axes.figure
    figure.clear()
    over_rates = figure.add_subplot()
    drawn[1].draw(over_rates)
    assert over_rates.get_xscale() == "log"
    assert drawn[0].told == (
        "learning_rate 0.001: 1 at 0, 2 at 0.5, 3 at 1; learning_rate 0.1: 5 at 0, 4 at 0.5"
    )


def test_names_along_an_axis_are_not_joined(axes: Any) -> None:
    runs = [a_run(name, settings={"student.model": f"models/{name}$_"}) for name in ("large", "small")]
    (ce, _) = sweep_drawings(runs)
    ce.draw(axes)
    assert [line.get_linestyle() for line in axes.lines] == ["None"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["models/large$_", "models/small$_"]


def test_runs_that_differ_in_everything_are_no_sweep() -> None:
    assert sweep_drawings([sweep_run(0.0, 1e-3, 1.0), sweep_run(1.0, 1e-1, 2.0)]) == []
    assert sweep_drawings([sweep_run(0.0, 1e-3, 1.0)]) == []


def asked(**changed: Any) -> dict[str, Any]:
    return {"is_short": True, "is_right": True, "token_f1": 1.0, "answer": "CT"} | changed


def test_models_disagree_where_one_is_right_and_another_is_not() -> None:
    question = Question(asked(), a_run("a"))
    question.answers |= {"a": asked(), "untrained": asked(is_right=False, answer="?")}
    assert not question.is_disputed
    question.answers["b"] = asked(is_right=False, answer="MR")
    assert question.is_disputed
    long = Question(asked(is_short=False), a_run("a"), {"a": asked(token_f1=0.5), "b": asked(token_f1=0.6)})
    assert not long.is_disputed
    long.answers["c"] = asked(token_f1=0.1)
    assert long.is_disputed


# --- the look --------------------------------------------------------------------------------------------


def test_many_series_differ_by_more_than_colour() -> None:
    looks = [Series(number) for number in range(64)]
    assert len({(one.marker, one.dashes) for one in looks}) > 30
    assert len({(one.color, one.marker, one.dashes) for one in looks}) == 64
    neighbours = looks[: len(COLORS)]
    assert len({one.marker for one in neighbours}) == len(COLORS)
    for one in looks:
        assert ElementTree.fromstring(swatch(one)).attrib["stroke"] == one.color


@pytest.mark.parametrize("color", COLORS)
def test_series_can_be_told_from_both_backgrounds(color: str) -> None:
    """WCAG 2.1, 1.4.11: three to one for what is no text."""

    def luminance(hexadecimal: str) -> float:
        parts = [int(hexadecimal[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for background in ("#ffffff", "#14181d"):
        light, dark = sorted([luminance(color), luminance(background)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3


def test_a_vector_picture_follows_the_background_and_is_the_same_each_time() -> None:

    def draw(axes: Any) -> None:
        axes.plot([1, 2], color=COLORS[0])
        axes.set(xlabel="step")

    first = svg(draw)
    assert first == svg(draw)
    text = first.decode()
    assert "prefers-color-scheme:dark" in text
    assert "var(--ink)" in text
    assert "#1d2733" in text.partition("prefers-color-scheme")[0]
    assert COLORS[0] in text
    assert "#ffffff" not in text
    assert "step" in [element.text for element in ElementTree.fromstring(first).iter() if element.text]


def test_a_picture_of_its_own_has_its_title(tmp_path: Path) -> None:
    titles = []

    def draw(axes: Any) -> None:
        titles.append(axes)
        axes.plot([1, 2])

    assert save_png(Drawing("$Loss", draw, ""), tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert titles[0].get_title() == "$Loss"


def test_when_an_axis_is_logarithmic(axes: Any) -> None:
    assert spans_much([7.0, 0.6])
    for values in ([], [1.0, 2.0], [0.0, 9.0], [-1.0, 9.0]):
        assert not spans_much(values)
    axes.plot([1, 2], [0.01, 30.0])
    set_log(axes)
    assert {round(tick * 100) for tick in axes.yaxis.get_major_locator()()} >= {1, 2, 5, 10, 20, 50}


def test_texts_of_figures_are_one_short_line() -> None:
    assert label("a\nb\x00") == "a b\\x00"
    assert label("_hidden") == " _hidden"
    assert len(label("x" * 500)) == 48
    assert shorten("abcdefghij", 9) == "abc...hij"
    assert shorten("abc", 3) == "abc"
    assert visible("tab\tline\nbell\x07 \ud800 \u202e\ufffe") == "tab\tline\nbell\\x07 \\ud800 \\u202e\\ufffe"
    assert (
        visible("\u05e9\u05dc\u05d5\u05dd \u4e2d\u6587 \U0001f600")
        == "\u05e9\u05dc\u05d5\u05dd \u4e2d\u6587 \U0001f600"
    )
    assert token_text(" a\n") == "\u2423a\u21b5"
    assert token_text("") == "(empty)"


def test_settings_unlike_the_defaults_with_these_beside_them() -> None:
    tree = {
        "data": {"source": "here"},
        "teacher": {"model": "large", "dtype": "float32"},
        "cache": {"path": "c", "policy": {"kind": "threshold", "tau": 0.25}},
        "student": {"model": "small", "lora": {"rank": 16, "alpha": 8.0}},
        "optimization": {"max_steps": 4, "weight_decay": 0.01},
        "run": {"name": "run"},
    }
    found = {key: (value, default) for key, value, default in differences(tree)}
    assert found["teacher.dtype"] == ("float32", "bfloat16")
    assert found["cache.policy.tau"] == ("0.25", "0.001953125")
    assert found["student.lora.alpha"] == ("8.0", "32.0")
    assert found["data.source"] == ("here", "(none)")
    assert not {"optimization.weight_decay", "student.lora.rank", "loss.kd_ratio"} & set(found)


@pytest.mark.parametrize("asked", [0, 1, 11, 12, 13, 23, 24, 35, 1000])
def test_questions_are_spread_over_all_that_were_asked(asked: int) -> None:
    """Of 23 the first twelve are no spread."""
    run = a_run("a")
    shown = [one.asked["row"] for one in spread_evenly([Question({"row": n}, run) for n in range(asked)], 12)]
    assert len(set(shown)) == min(12, asked)
    gaps = {after - before for before, after in itertools.pairwise([*shown, asked])}
    assert shown == sorted(shown)
    assert max(gaps, default=0) - min(gaps, default=0) <= 1
