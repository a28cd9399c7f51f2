"""Proves on real examples what both stages take for granted of a model, at the start of each.

    check_model(model, processor, [first, second], device=device)

Four forwards of one to four examples: body and head make the model's own logits; no hidden state depends on a
token behind it; examples in one batch do not depend on each other.  Two more where examples are packed: they do not
depend on each other there either.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from math import isfinite

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from shared.data.collation import IGNORE_INDEX, Batch, Encoded, packed
from shared.data.processing import ExampleProcessor
from shared.data.rows import VqaSplit
from shared.errors import DataError, RecipeError, TeachonceError, TrainingError, is_out_of_memory, shortened
from shared.models.quantized import method_of
from shared.models.vlm import in_dtype_of, last_hidden_states, split

NUM_COMPARED = (
    64  # logits of at most so many positions exist, unless the last label stands further from the end
)
NUM_LOOKED_AT = 8  # examples, for two whose pictures differ in size

# Of the largest logit, or of the root of the mean square.  Rows of one batch go through the same kernels, others do
# not; and in 16 bits a mixture of experts may send a token elsewhere.  On a GPU equal rows of a batch may differ too,
# by what is measured.
SPLIT = {torch.float32: 1e-4}, 5e-2
CAUSAL = {torch.float32: 1e-4}, 2e-2
TOGETHER = {torch.float32: 1e-3}, 1e-1
TIMES_NOISE = 3  # of the difference between equal rows


def usable(rows: Iterable[tuple[VqaSplit, int]], processor: ExampleProcessor) -> Iterator[Encoded]:
    """The rows that can be used, encoded, in order.

    Raises   DataError  with the first row's reason when there is none
    """
    reasons: list[str] = []
    found = False
    for examples, row in rows:
        try:
            one = processor.encode(examples[row])
        except DataError as error:
            reasons = reasons or [f"the first: {error}"]
            continue
        found = True
        yield one
    if not found:
        raise DataError("; ".join(["no row can be used", *reasons]))


def two_examples(encoded: Iterable[Encoded]) -> list[Encoded]:
    """Two of the first few examples: one with pictures, and one whose pictures have another size, where there are.

    Short ones: what is far longer than the others may not fit into memory four times.
    """
    some = sorted(islice(encoded, NUM_LOOKED_AT), key=lambda one: (not one.per_picture, len(one.input_ids)))
    first, others = some[0], some[1:] or some[:1]
    unlike = [one for one in others if _sizes(one) != _sizes(first)]
    return [first, (unlike or others)[0]]


@torch.no_grad()
def check_model(
    model: PreTrainedModel,
    processor: ExampleProcessor,
    examples: Sequence[Encoded],
    *,
    device: torch.device,
    packing: bool = False,
) -> None:
    """Called with the model in evaluation mode; of a sharded one by all ranks, with the same two examples.

    packing  also that it keeps examples apart that are packed into one row

    Raises   RecipeError    saying what was compared, and how far it was off; or that the model cannot be run
             TrainingError  when memory does not suffice for them
    """
    try:
        _check_model(model, processor, examples, device=device)
        if packing:
            _check_packing(model, processor, examples, device=device)
    except TeachonceError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise _cannot_run(model, error) from error
        longest = max(len(one.input_ids) for one in examples)
        raise TrainingError(
            f"four examples of {longest:,} tokens, which the check of the model takes, do not fit into memory. "
            "Lower data.max_pixels, or take a smaller model or more ranks"
        ) from error


def _check_model(
    model: PreTrainedModel, processor: ExampleProcessor, examples: Sequence[Encoded], *, device: torch.device
) -> None:
    first, second = examples
    changed, place = _with_another_last_token(first, second, processor)

    def batch_of(*encoded: Encoded) -> Batch:
        return processor.collate(encoded).to(device)

    alone, other, together = batch_of(first), batch_of(second), batch_of(first, changed, second, first)
    own_NV = _own_logits(model, alone)
    alone_SD, other_SD, together_BSD = (_states(model, batch) for batch in (alone, other, together))
    alone_SD, other_SD = alone_SD[0], other_SD[0]
    predicting = alone.position_index[-len(own_NV) :]
    _compare_logits(model, own_NV, alone_SD[predicting], num_needed=processor.num_answer_ids)
    _compare(
        model,
        CAUSAL,
        together_BSD[0, :place],
        together_BSD[1, :place],
        "when the last token of its answer is another one, the hidden states before it",
        "It reads answers before it predicts them, so that its losses would mean nothing; it cannot be used",
        noise=_difference(together_BSD[0, :place], together_BSD[-1, :place]),
    )
    for row, states_SD, batch in ((0, alone_SD, alone), (2, other_SD, other)):
        _compare(
            model,
            TOGETHER,
            states_SD[batch.position_index],
            together_BSD[row, batch.position_index],
            "when other examples are in its batch, with pictures of other sizes, an example's hidden states",
            "Its results would depend on how examples fall into batches; it cannot be used",
        )


def _cannot_run(model: PreTrainedModel, error: Exception) -> RecipeError:
    """For an error inside a library, whose traceback goes into the log: its settings are a stranger's."""
    logging.getLogger(__name__).error("the check of the model", exc_info=error)
    said = shortened((str(error).strip() or "nothing more is said").splitlines()[0])
    if (method := method_of(model.config)) is not None:
        return RecipeError(
            f"model {model.name_or_path}: its weights are quantised ({method}), and their library cannot run them on "
            f"{model.device.type}: {said}. Give the folder of the model before it was quantised"
        )
    return RecipeError(
        f"model class {type(model).__name__}: it cannot be run on the first examples ({type(error).__name__}: "
        f"{said}). Settings in config.json, or of the processor, may not fit its weights: fetch its files again"
    )


def _check_packing(
    model: PreTrainedModel, processor: ExampleProcessor, examples: Sequence[Encoded], *, device: torch.device
) -> None:
    """Each example between others is what it is alone, and what it is between yet others."""
    first, second = examples
    changed = _with_another_answer(first, processor)

    def states_of(*encoded: Encoded) -> list[Tensor]:
        states_SD = _states(model, packed(encoded).to(device))[0]
        return list(states_SD.split([len(one.input_ids) for one in encoded]))

    alone = {id(one): _states(model, processor.collate([one]).to(device))[0] for one in examples}
    row, other_row = (second, first, second), (second, changed, second)
    try:
        in_row, in_other_row = states_of(*row), states_of(*other_row)
    except (ValueError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise RecipeError(
            f"model class {type(model).__name__}: it cannot be fed examples that are packed into one row "
            f"({shortened(str(error))}). Set optimization.packing to false"
        ) from error
    remedy = "It does not keep them apart, so that answers would leak. Set optimization.packing to false"
    for one, states_SD in zip(row, in_row, strict=True):
        what = "when other examples are packed into its row, an example's hidden states"
        _compare(model, TOGETHER, alone[id(one)], states_SD, what, remedy)
    what = "when another answer is packed in front of it, an example's hidden states"
    _compare(model, CAUSAL, in_row[-1], in_other_row[-1], what, remedy)


def _sizes(one: Encoded) -> list[object]:
    """What tells pictures of different sizes apart: shapes, and the numbers that stand for them."""
    return [
        (name, tuple(value.shape), None if value.is_floating_point() else value.tolist())
        for name, value in sorted(one.per_picture.items())
    ]


def _with_another_last_token(
    first: Encoded, second: Encoded, processor: ExampleProcessor
) -> tuple[Encoded, int]:
    """The example with another token in its last label's place, and that place."""
    place = int((first.labels != IGNORE_INDEX).nonzero()[-1, 0])
    usual = [*first.answer_ids.tolist(), *second.answer_ids.tolist(), processor.end_of_turn]
    ids = first.input_ids.clone()
    ids[place] = next((token for token in usual if token != ids[place]), int(ids[0]))
    return replace(first, input_ids=ids), place


def _with_another_answer(one: Encoded, processor: ExampleProcessor) -> Encoded:
    """The example with other tokens wherever there is a label."""
    ids, labelled = one.input_ids.clone(), one.labels != IGNORE_INDEX
    ids[labelled] = ids[labelled].roll(1)
    ids[labelled & (ids == one.input_ids)] = processor.end_of_turn
    return replace(one, input_ids=ids)


def _states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The body's hidden states (B, S, D)."""
    body, head = split(model)
    states = last_hidden_states(body, in_dtype_of(head, batch.inputs))
    num_tokens, num_states = batch.inputs["input_ids"].shape[1], states.shape[1]
    if num_states != num_tokens:
        raise RecipeError(
            f"model class {type(model).__name__}: it gives {num_states} hidden states for {num_tokens} tokens, as "
            "where pictures stand in front of a text that has no placeholders. It cannot be used"
        )
    return states


def _own_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The model's own logits (n, V) at the last n label positions of its one example."""
    length = batch.inputs["input_ids"].shape[1]
    near = batch.position_index[batch.position_index >= length - NUM_COMPARED]
    near = near if len(near) else batch.position_index[-1:]
    keep = length - int(near[0])
    inputs = in_dtype_of(split(model)[1], batch.inputs)
    logits_SV = model(**inputs, use_cache=False, logits_to_keep=keep).logits[0]
    return logits_SV[near - length]


def _compare_logits(model: PreTrainedModel, own_NV: Tensor, hidden_ND: Tensor, *, num_needed: int) -> None:
    """The model's own logits, of which some behind the tokenizer's ids may be cut off, with those of its head."""
    head, name = split(model)[1], f"model class {type(model).__name__}"
    width = own_NV.shape[1]
    if width < num_needed:
        raise RecipeError(
            f"{name}: it gives {width} logits, its tokenizer has {num_needed} ids. They do not belong together"
        )
    ours_NV = _first(width, head.logits(hidden_ND))
    if num_left_out := _num_left_out(own_NV, ours_NV):
        raise RecipeError(
            f"{name}: it leaves {num_left_out} ids out by giving them the lowest logit there is, which its body and "
            "its head do not. Take another model"
        )
    largest = own_NV.float().abs().max().item()
    if not isfinite(largest):
        raise RecipeError(
            f"{name}: it gives NaN or infinity for the first examples. Its weights may be damaged, or its dtype too "
            "narrow (float32 may help)"
        )
    worst = _farthest(own_NV, ours_NV)
    allowed = _tolerance(SPLIT, own_NV) * max(1.0, largest)
    if worst <= allowed:
        return
    uncapped_NV = _first(width, replace(head, softcap=None).logits(hidden_ND))
    if head.softcap is not None and _farthest(own_NV, uncapped_NV) <= allowed:
        raise RecipeError(
            f"{name}: its config.json caps logits (final_logit_softcapping {head.softcap:g}), and this class of "
            f"Transformers {transformers.__version__} leaves the cap out, so that its logits are not those that it "
            "was made with. Take another version of Transformers, or another model"
        )
    raise RecipeError(
        f"{name}: its logits differ by {worst:.3g} from those of its body and its head, where none is above "
        f"{largest:.3g}: it changes them in a way that is not known here. Take another model"
    )


def _farthest(one_NV: Tensor, other_NV: Tensor) -> float:
    return (one_NV.float() - other_NV.float()).abs().max().item()


def _first(width: int, logits_NV: Tensor) -> Tensor:
    return logits_NV if logits_NV.shape[1] == width else logits_NV[:, :width]


def _num_left_out(own_NV: Tensor, ours_NV: Tensor) -> int:
    """Ids whose own logit is the lowest of the dtype, or minus infinity, at every position, and ours is not."""
    lowest = torch.finfo(own_NV.dtype).min
    if not own_NV.min().item() <= lowest:
        return 0
    return int(((own_NV <= lowest) & ours_NV.isfinite()).all(dim=0).sum().item())


def _compare(
    model: PreTrainedModel,
    tolerances: tuple[dict[torch.dtype, float], float],
    one_SD: Tensor,
    other_SD: Tensor,
    what: str,
    why: str,
    *,
    noise: float = 0.0,
) -> None:
    """``noise``: what equal rows differ by; it widens the tolerance, to that of other batches at most."""
    difference = _difference(one_SD, other_SD)
    if not isfinite(difference):
        raise RecipeError(
            f"model class {type(model).__name__}: its hidden states for the first examples are NaN, infinite or all "
            "0. Its weights may be damaged, or its dtype too narrow (float32 may help)"
        )
    allowed = max(_tolerance(tolerances, one_SD), min(TIMES_NOISE * noise, _tolerance(TOGETHER, one_SD)))
    if not difference <= allowed:
        raise RecipeError(
            f"model class {type(model).__name__}: {what} change by {difference:.2g} of their size, where "
            f"{allowed:.2g} is rounding. {why}"
        )


def _difference(one_SD: Tensor, other_SD: Tensor) -> float:
    return ((one_SD.float() - other_SD.float()).norm() / one_SD.float().norm()).item()


def _tolerance(tolerances: tuple[dict[torch.dtype, float], float], values: Tensor) -> float:
    exact, rough = tolerances
    return exact.get(values.dtype, rough)
