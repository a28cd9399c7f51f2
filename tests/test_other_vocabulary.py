"""A teacher's targets at the positions and ids of a student with another tokenizer, against a slow reference."""

from __future__ import annotations

import math
import random
from functools import cache

import numpy as np
import pytest
import reference_regrouping as reference
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from shared.data.processing import Learned
from shared.errors import CacheMismatchError, RecipeError
from shared.kd_loss import Divergence, fused_ce_kd
from shared.other_vocabulary import Alignment, VocabularyMap, align, regrouped
from shared.other_vocabulary.token_bytes import TokenBytes
from shared.other_vocabulary.vocabulary_map import AS_IS, NO_ID, WITH_BLANK, WITHOUT_BLANK
from shared.recipes.policies import Policy, Random, Threshold, TopK
from shared.sparse import RegroupedTargets, SparseTargets, mix, position_seeds, regroup, sparsify

ENGLISH = [
    "Which plane is shown? The axial plane, at the level of the kidneys.",
    "There is a hyperintense lesion in the left frontal lobe on T2.",
    "No fracture; 3.5 cm mass (right).\nNaive caf\u00e9 \u20ac 12",
] * 4
OTHER = [
    "Das Bild zeigt \u20ac \u00fcber \u4e2d\u6587 hypo",
    "lesion lobes planes axially",
    "and on and on, again",
] * 4
KINDS = ("byte-level", "prefixed byte-level", "like Gemma", "like Llama 2")


@cache
def tokenizer(kind: str, own: bool) -> PreTrainedTokenizerFast:
    """``own``: the student's, of half the size and trained on other texts."""
    texts, size = (OTHER, 330) if own else (ENGLISH, 420)
    if "byte-level" in kind:
        return reference.byte_level(texts, size, add_prefix_space=kind.startswith("prefixed"))
    return reference.sentence_piece(texts, size, prepends=kind.endswith("2"))


@cache
def vocabulary(teacher: str, student: str) -> VocabularyMap:
    theirs, own = tokenizer(teacher, False), tokenizer(student, True)
    return VocabularyMap(theirs, own, end_of_turn=(theirs.eos_token_id, own.eos_token_id))


def one(found: VocabularyMap, number: int, lead: int = AS_IS) -> int:
    """The id of the student that a token of the teacher begins with."""
    return int(found.first_ids(np.array([number]), lead)[0])


def aligned(teacher: str, student: str, theirs: Learned, own: Learned) -> Alignment:
    """Of one answer."""
    ends = (tokenizer(teacher, False).eos_token_id, tokenizer(student, True).eos_token_id)
    return align(vocabulary(teacher, student), [theirs], [own], ends=ends)


def ids_of(tokens: PreTrainedTokenizerFast, text: str) -> list[int]:
    """As they follow a line's end."""
    ids = tokens("\n" + text, add_special_tokens=False)["input_ids"]
    spell = reference.spelled(tokens)
    while ids and b"\n" not in spell(ids[0]):
        ids = ids[1:]
    return [int(number) for number in ids[1:]]


def some_targets(num_positions: int, vocab_size: int, seed: int, policy: Policy) -> SparseTargets:
    generator = torch.Generator().manual_seed(seed)
    logprobs = (3 * torch.randn(num_positions, vocab_size, generator=generator)).log_softmax(-1)
    seeds = position_seeds(seed, bytes(16), num_positions)
    return sparsify(logprobs, policy, temperatures=(1.0,), seeds=seeds)


def by_position(targets: SparseTargets | RegroupedTargets) -> list[dict[int, float]]:
    weights = targets.weights(1.0, torch.float64)
    found: list[dict[int, float]] = [{} for _ in range(targets.num_positions)]
    for position, number, weight in zip(
        targets.position_index.tolist(), targets.ids.tolist(), weights.tolist(), strict=True
    ):
        assert number not in found[position]
        found[position][number] = weight
    return found


TEXTS = st.text(st.sampled_from("aehilnorst .,3(\n\u00e9\u20ac\u4e2d"), min_size=1, max_size=24)
SENTENCES = st.sampled_from([part for text in ENGLISH[:3] for part in text.split(" ", 2)])


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
@settings(max_examples=8)
@given(text=st.one_of(TEXTS, SENTENCES), seed=st.integers(0, 1000))
@example(text="33333333333\u4e2d\u4e2d", seed=0)
@example(text="a\n    - a", seed=0)
def test_targets_are_those_of_the_reference(teacher: str, student: str, text: str, seed: int) -> None:
    text = "x" + text  # a line's end or a blank in front belongs to what stands before it
    theirs, own = tokenizer(teacher, False), tokenizer(student, True)
    teacher_ids, student_ids = ids_of(theirs, text), ids_of(own, text)
    alignment = aligned(
        teacher, student, Learned(tuple(teacher_ids), True), Learned(tuple(student_ids), True)
    )
    targets = some_targets(len(teacher_ids) + 1, len(theirs), seed, Threshold(tau=1 / 16))
    found, coverage = regrouped(targets, alignment, vocabulary(teacher, student))
    rows = by_position(targets)
    whole = [{n: w for n, w in row.items() if _is_whole(theirs, n)} for row in rows]
    expected = reference.regrouped(theirs, own, teacher_ids, student_ids, whole)
    assert found.is_shared_N.tolist() == [one is not None for one in expected]
    broken = {
        first
        for n in range(len(theirs))
        if not _is_whole(theirs, n)
        for first in [_first(teacher, student, n)]
    }
    labels = [*student_ids, own.eos_token_id]
    their_labels = alignment.their_label_N.tolist()
    for row, wanted, label, their_label in zip(
        by_position(found), expected, labels, their_labels, strict=True
    ):
        if wanted is None:
            assert row == {label: 1.0}
            continue
        unknown = broken if _is_whole(theirs, their_label) else broken | {label}
        for number in (row.keys() | wanted.keys()) - unknown:
            assert row.get(number, 0.0) == pytest.approx(wanted.get(number, 0.0), abs=1e-12)
    assert coverage.positions == len(student_ids) + 1
    assert coverage.shared == sum(one is not None for one in expected)
    masses = [sum(row.values()) for row in by_position(found)]
    assert coverage.mapped + expected.count(None) == pytest.approx(sum(masses))


def _first(teacher: str, student: str, number: int) -> int:
    return one(vocabulary(teacher, student), number)


def _is_whole(tokens: PreTrainedTokenizerFast, number: int) -> bool:
    """Whether a token is whole characters, or the end: the reference knows no others."""
    if number in (tokens.eos_token_id, tokens.unk_token_id):
        return number == tokens.eos_token_id
    try:
        reference.spelled(tokens)(number).decode()
    except UnicodeDecodeError:
        return False
    return True


@pytest.mark.parametrize("student", KINDS)
@pytest.mark.parametrize("teacher", KINDS)
def test_nearly_every_token_of_text_begins_with_one_of_the_student(teacher: str, student: str) -> None:
    found = vocabulary(teacher, student)
    theirs = found.teacher
    first = found.first_ids(np.arange(len(theirs)))
    assert (first[theirs.is_text] != NO_ID).mean() > 0.97
    for number in np.flatnonzero(first != NO_ID).tolist():
        text, own = theirs[number], found.student[int(first[number])]
        if text is not None:
            assert own is not None
            assert text.startswith(own) or own.startswith(text[:1])


def test_the_bytes_of_every_token_are_the_text() -> None:
    text = "x caf\u00e9 \u20ac\u4e2d\n  the lesion"
    for kind in KINDS:
        for own in (False, True):
            tokens = tokenizer(kind, own)
            found = TokenBytes.of(tokens).each(ids_of(tokens, text))
            assert found is not None
            assert b"".join(found) == text.encode()


def test_an_added_token_of_blanks_is_blanks() -> None:
    """Gemma's tokenizers have these, and their model writes them as well."""
    tokens = tokenizer("like Gemma", True)
    ids = ids_of(tokens, "a\n    - a")
    blanks = tokens.convert_tokens_to_ids("\u2581\u2581")
    assert blanks in tokens.added_tokens_decoder
    assert ids.count(blanks) == 2
    assert TokenBytes.of(tokens)[blanks] == b"  "


def test_bytes_that_are_no_character_keep_their_own_tokens() -> None:
    """The euro sign is three bytes, cut after the first or second in either vocabulary."""
    for teacher in ("byte-level", "like Gemma"):
        for student in ("byte-level", "like Gemma"):
            found = vocabulary(teacher, student)
            numbers = [n for n, one in enumerate(found.teacher) if one == b"\xe2"]
            assert len(numbers) == 1
            assert found.student[_first(teacher, student, numbers[0])] == b"\xe2"


def test_control_tokens_have_no_id_but_for_the_end_of_the_turn() -> None:
    theirs, own = (reference.byte_level(texts, 300) for texts in (ENGLISH, OTHER))
    theirs.add_special_tokens({"additional_special_tokens": ["<|pad|>"]})
    theirs.add_tokens(["<think>"])
    found = VocabularyMap(theirs, own, end_of_turn=(theirs.eos_token_id, own.eos_token_id))
    control, thought = (theirs.convert_tokens_to_ids(one) for one in ("<|pad|>", "<think>"))
    for lead in (AS_IS, WITHOUT_BLANK, WITH_BLANK):
        assert one(found, theirs.eos_token_id, lead) == own.eos_token_id
        assert one(found, control, lead) == NO_ID
    assert found.student[one(found, thought)] == b"<"  # added, but text


def test_a_tokenizer_whose_tokens_are_no_stretches_of_the_text_is_refused() -> None:
    made = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    made.decoder = decoders.WordPiece()
    with pytest.raises(RecipeError, match=r"decoder WordPiece.*student\.other_vocabulary"):
        TokenBytes.of(PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]"))


def test_a_blank_in_front_of_one_of_the_two_answers_is_allowed_for() -> None:
    for teacher, student, lead in (
        ("like Llama 2", "byte-level", WITHOUT_BLANK),
        ("byte-level", "like Llama 2", WITH_BLANK),
    ):
        theirs, own = tokenizer(teacher, False), tokenizer(student, True)
        found = vocabulary(teacher, student)
        blanks = {teacher: " " * teacher.endswith("2"), student: " " * student.endswith("2")}
        ids = [ids_of(one, blanks[kind] + "plan") for kind, one in ((teacher, theirs), (student, own))]
        alignment = aligned(teacher, student, *(Learned(tuple(one), True) for one in ids))
        assert alignment.teacher_N[0] == 0
        assert alignment.lead_N.tolist() == [lead, *[AS_IS] * len(ids[1])]
        first = one(found, ids[0][0], lead)
        text = reference.spelled(theirs)(ids[0][0]).decode()
        assert first == reference.first_id(own, text[1:] if lead == WITHOUT_BLANK else f" {text}")
        assert alignment.teacher_N[-1] == len(ids[0])


def test_answers_that_are_cut_share_what_both_have() -> None:
    theirs, own = tokenizer("byte-level", False), tokenizer("like Gemma", True)
    text = ENGLISH[0]
    teacher_ids, student_ids = ids_of(theirs, text), ids_of(own, text)
    kinds = ("byte-level", "like Gemma")
    full, own_full = Learned(tuple(teacher_ids), True), Learned(tuple(student_ids), True)
    whole = aligned(*kinds, full, own_full)
    cut = aligned(*kinds, Learned(tuple(teacher_ids[:4]), False), own_full)
    assert cut.num_teacher_positions == 4
    wanted = np.where(whole.teacher_N < 4, whole.teacher_N, -1)
    np.testing.assert_array_equal(cut.teacher_N, wanted)
    shorter = aligned(*kinds, full, Learned(tuple(student_ids[:5]), False))
    np.testing.assert_array_equal(shorter.teacher_N, whole.teacher_N[:5])
    other = aligned(*kinds, full, Learned(tuple(student_ids[1:]), True))
    assert other.num_unlike == 1
    assert (other.teacher_N == -1).all()
    assert (other.num_teacher_positions, len(other.teacher_N)) == (len(teacher_ids) + 1, len(student_ids))


@pytest.mark.parametrize(
    ("theirs", "own"),
    [
        ("Yes.\n", "Yes."),
        ("Yes. ", "Yes."),
        ("\nYes.", "Yes."),
        ("\n\nYes.\u3000\n", "Yes."),
        ("Yes.\n", "Yes. "),
        ("Yes.", "\nYes.\n"),
    ],
)
@pytest.mark.parametrize("student", ["byte-level", "like Gemma"])
@pytest.mark.parametrize("teacher", ["byte-level", "like Gemma"])
def test_blanks_and_line_ends_around_an_answer_are_allowed_for(
    teacher: str, student: str, theirs: str, own: str
) -> None:
    """A teacher's ids may say them; the text of its answer does not.  The end of the turn must follow the same."""
    answers, begins = [], []
    for tokens, text in ((tokenizer(teacher, False), theirs), (tokenizer(student, True), own)):
        ids = tokens(text, add_special_tokens=False)["input_ids"]
        answers.append(Learned(tuple(ids), True))
        lengths = [len(reference.spelled(tokens)(number)) for number in ids]
        begins.append(np.cumsum([0, *lengths]) - text.index("Y"))
    found = aligned(teacher, student, *answers)
    assert found.num_unlike == 0
    num_shared = len("Yes.") + (theirs.lstrip() == own.lstrip())
    places = {begin: place for place, begin in enumerate(begins[0].tolist()) if 0 <= begin < num_shared}
    assert found.teacher_N.tolist() == [places.get(begin, -1) for begin in begins[1].tolist()]
    assert 0 in places
    assert (found.lead_N == AS_IS).all()


def test_an_end_of_the_turn_goes_with_an_end_alone() -> None:
    """One of the two answers is cut behind the blank that the other has not."""
    kinds = ("byte-level", "like Gemma")
    tokens = (tokenizer("byte-level", False), tokenizer("like Gemma", True))
    full, blank = (
        [one(text, add_special_tokens=False)["input_ids"] for one in tokens] for text in ("Yes.", "Yes.\n")
    )
    for theirs, own in (
        (Learned(tuple(blank[0]), False), Learned(tuple(full[1]), True)),
        (Learned(tuple(full[0]), True), Learned(tuple(blank[1]), False)),
    ):
        found = aligned(*kinds, theirs, own)
        assert found.num_unlike == 0
        assert found.teacher_N[0] == 0
        assert found.teacher_N[-1] == -1


def test_an_answer_of_no_positions_has_no_boundary() -> None:
    text = Learned(
        tuple(tokenizer("like Llama 2", False)("axial", add_special_tokens=False)["input_ids"]), False
    )
    none = Learned((), False)
    assert aligned("like Llama 2", "byte-level", text, none).teacher_N.tolist() == []
    own = Learned(
        tuple(tokenizer("like Llama 2", True)("axial", add_special_tokens=False)["input_ids"]), False
    )
    assert (aligned("byte-level", "like Llama 2", none, own).teacher_N == -1).all()


def test_several_answers_stand_one_behind_the_other() -> None:
    theirs, own = tokenizer("byte-level", False), tokenizer("byte-level", True)
    pairs = [
        (Learned(tuple(ids_of(theirs, text)), is_ended), Learned(tuple(ids_of(own, text)), is_ended))
        for text, is_ended in (("axial", True), ("no fracture", False), ("left", True))
    ]
    alone = [aligned("byte-level", "byte-level", one, other) for one, other in pairs]
    joined = Alignment.joined(alone)
    again = align(
        vocabulary("byte-level", "byte-level"),
        [one for one, _ in pairs],
        [other for _, other in pairs],
        ends=(theirs.eos_token_id, own.eos_token_id),
    )
    np.testing.assert_array_equal(joined.teacher_N, again.teacher_N)
    before, wanted = 0, []
    for one in alone:
        wanted += [-1 if n < 0 else n + before for n in one.teacher_N.tolist()]
        before += one.num_teacher_positions
    assert joined.teacher_N.tolist() == wanted
    assert joined.num_teacher_positions == before


# --- regrouped targets -----------------------------------------------------------------------------------


def identity(targets: SparseTargets) -> RegroupedTargets:
    everywhere = torch.ones(targets.num_positions, dtype=torch.bool)
    return regroup(
        targets, targets.ids.long(), everywhere, torch.full_like(everywhere, -1, dtype=torch.int64)
    )


def some_regrouped(policy: Policy, *, mixed: bool = False) -> RegroupedTargets:
    """Seven positions, five of them shared; 40 ids of a teacher become 17 of a student, some of them none."""
    is_shared = torch.tensor([True, False, True, True, False, True, True])
    source = some_targets(5, 40, 3, policy)
    teachers = mix([source, some_targets(5, 40, 4, policy)], shares=[0.25, 0.75]) if mixed else source
    ids = torch.tensor([n % 19 - 2 for n in range(40)])[teachers.ids.long()]
    return regroup(teachers, ids, is_shared, torch.arange(10, 17))


def dense(targets: RegroupedTargets) -> torch.Tensor:
    found = torch.zeros(targets.num_positions, 17, dtype=torch.float64)
    for position, row in enumerate(by_position(targets)):
        for number, weight in row.items():
            found[position, number] = weight
    return found


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("policy", [Threshold(tau=1 / 8), Random(draws=9), TopK(k=6)], ids=str)
def test_slices_and_selections_are_those_of_the_dense_rows(policy: Policy, mixed: bool) -> None:
    targets = some_regrouped(policy, mixed=mixed)
    whole = dense(targets)
    assert whole[[1, 4]].nonzero().tolist() == [[0, 11], [1, 14]]  # their labels
    assert whole[[1, 4]].sum() == 2
    for start in range(8):
        for stop in range(start, 8):
            torch.testing.assert_close(
                dense(targets.slice(start, stop)), whole[start:stop], rtol=1e-14, atol=0
            )
    index = torch.tensor([6, 1, 3, 3, 0, 4])
    torch.testing.assert_close(dense(targets.select(index)), whole[index], rtol=1e-14, atol=0)
    assert dense(targets.select(index[:0])).shape == (0, 17)
    with pytest.raises(CacheMismatchError, match="temperature 2 was not captured"):
        targets.weights(2.0)


@pytest.mark.parametrize("policy", [Threshold(tau=1 / 8), Random(draws=5)], ids=str)
def test_the_mean_over_many_draws_is_the_teacher_regrouped(policy: Policy) -> None:
    num_draws, theirs, own = 3000, tokenizer("byte-level", False), tokenizer("like Gemma", True)
    found = vocabulary("byte-level", "like Gemma")
    generator = torch.Generator().manual_seed(5)
    logprobs = (2 * torch.randn(1, len(theirs), generator=generator)).log_softmax(-1)
    drawn = sparsify(
        logprobs.expand(num_draws, -1).contiguous(),
        policy,
        temperatures=(1.0,),
        seeds=position_seeds(1, bytes(16), num_draws),
    )
    none = np.full(num_draws, -1)
    each = Alignment(np.arange(num_draws), np.full(num_draws, AS_IS), none, none, num_draws)
    targets, coverage = regrouped(drawn, each, found)
    rows = torch.zeros(num_draws, len(own), dtype=torch.float64)
    rows[targets.position_index, targets.ids.long()] = targets.weights(1.0, torch.float64)
    expected = torch.zeros(len(own), dtype=torch.float64)
    for number, p in enumerate(logprobs[0].double().exp().tolist()):
        if (first := one(found, number)) != NO_ID:
            expected[first] += p
    error = rows.std(0) / math.sqrt(num_draws) + 2e-4
    assert ((rows.mean(0) - expected).abs() < 5 * error).all()
    assert coverage.share_of_mass == pytest.approx(expected.sum().item(), abs=0.01)


def test_a_mix_is_regrouped_as_its_parts_are() -> None:
    theirs, own = tokenizer("byte-level", False), tokenizer("like Gemma", True)
    ids, own_ids = ids_of(theirs, ENGLISH[1]), ids_of(own, ENGLISH[1])
    alignment = aligned("byte-level", "like Gemma", Learned(tuple(ids), True), Learned(tuple(own_ids), True))
    parts = [some_targets(len(ids) + 1, len(theirs), seed, Threshold(tau=1 / 16)) for seed in (1, 2)]
    of_each = [
        by_position(regrouped(one, alignment, vocabulary("byte-level", "like Gemma"))[0]) for one in parts
    ]
    mixed, coverage = regrouped(
        mix(parts, shares=[0.25, 0.75]), alignment, vocabulary("byte-level", "like Gemma")
    )
    for first, second, row in zip(*of_each, by_position(mixed), strict=True):
        wanted = {n: 0.25 * first.get(n, 0) + 0.75 * second.get(n, 0) for n in first.keys() | second.keys()}
        assert row == pytest.approx(wanted)
    assert 0.9 < coverage.share_of_mass <= 1


def losses(targets: object, **options: object) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(7, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(17, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([1, 2, -100, 4, 5, 6, 7])
    sums = fused_ce_kd(hidden, weight, labels, targets, kd_ratio=0.6, **options)  # type: ignore[arg-type]
    sums.loss.backward()
    assert hidden.grad is not None
    return sums.kd, sums.ce, hidden.grad


@pytest.mark.parametrize("chunk_size", [2, 512])
@pytest.mark.parametrize(
    ("policy", "tail"), [(Threshold(tau=1 / 8), "ghost"), (TopK(k=6), "drop"), (TopK(k=6), "renormalize")]
)
def test_loss_and_gradient_are_those_of_a_dense_cross_entropy(
    policy: Policy, tail: str, chunk_size: int
) -> None:
    targets = some_regrouped(policy)
    kd, ce, gradient = losses(targets, tail=tail, chunk_size=chunk_size)
    goal = dense(targets)
    if tail == "renormalize":
        kept = torch.ones(7, dtype=torch.float64)
        kept[targets.is_shared_N] = torch.tensor(
            [sum(row.values()) for row in by_position(targets.source)], dtype=torch.float64
        )
        goal = goal / kept[:, None]
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(7, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(17, 8, generator=generator, dtype=torch.float64)
    logq = (hidden @ weight.T).log_softmax(-1)
    counts = torch.tensor([1, 1, 0, 1, 1, 1, 1], dtype=torch.float64)
    expected_kd = -((goal * logq).sum(-1) * counts).sum()
    expected_ce = -(logq[range(7), [1, 2, 0, 4, 5, 6, 7]] * counts).sum()
    (0.4 * expected_ce + 0.6 * expected_kd).backward()
    torch.testing.assert_close(kd, expected_kd.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ce, expected_ce.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradient, hidden.grad, rtol=1e-6, atol=1e-8)


def test_with_the_teacher_s_own_ids_the_gradient_is_today_s() -> None:
    """The value differs by the entropy alone, which nobody knows of regrouped targets."""
    targets = some_targets(7, 17, 6, Threshold(tau=1 / 8))
    plain, same = losses(targets), losses(identity(targets))
    torch.testing.assert_close(plain[2], same[2], rtol=1e-12, atol=1e-14)
    counted = targets.entropy[[0, 1, 3, 4, 5, 6], 0].double().sum()
    torch.testing.assert_close(plain[0] + counted, same[0], rtol=1e-6, atol=0)


def test_what_is_not_linear_in_the_teacher_is_refused() -> None:
    cut_off, sampled = some_regrouped(TopK(k=6)), some_regrouped(Threshold(tau=1 / 8))
    for tail in ("ghost", "uniform"):
        with pytest.raises(
            RecipeError, match=f"tail {tail} of a top_k cache and a student with another tokenizer"
        ):
            losses(cut_off, tail=tail)
    for targets in (cut_off, sampled):
        with pytest.raises(RecipeError, match="reverse_kl of a teacher with another tokenizer"):
            losses(targets, tail="drop", divergence=Divergence("reverse_kl"))


def test_maps_of_the_same_tokenizer_are_the_identity() -> None:
    """For all tokens that the tokenizer itself makes of some text."""
    for kind in KINDS:
        tokens = tokenizer(kind, False)
        found = VocabularyMap(tokens, tokens, end_of_turn=(tokens.eos_token_id, tokens.eos_token_id))
        ids = ids_of(tokens, ENGLISH[1])
        random.Random(0).shuffle(ids)
        assert found.first_ids(np.array(ids)).tolist() == ids
