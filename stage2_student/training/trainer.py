"""The student in training: what changes from step to step, and the log of it."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from shared.dealing import Work
from shared.errors import (
    CacheFormatError,
    CacheMismatchError,
    CheckpointError,
    TeachonceError,
    TrainingError,
)
from shared.model_check import two_examples
from shared.progress import progress
from shared.recipes import Recipe
from shared.runtime import World
from shared.stopping import StopRequest
from stage2_student.runs.checkpoint import Checkpoint, Facts, load, set_num_updates, student_state
from stage2_student.runs.run_folder import RunFolder
from stage2_student.runs.tracking import Trackers
from stage2_student.training.agreement import Step, in_agreement
from stage2_student.training.dropped import EVENT, Dropped, dropped_so_far
from stage2_student.training.feed import Microbatch, feed
from stage2_student.training.inputs import Inputs, no_kl
from stage2_student.training.optim import learning_rate, make_optimizer, set_learning_rate
from stage2_student.training.order import StepShape, pass_slots, training_slots
from stage2_student.training.step import Losses, StepResult, seed_step, train_step
from stage2_student.training.student import build_student, reshard
from stage2_student.training.survey import Survey
from stage2_student.training.validate import Validation, validate

PATIENCE_S = 10.0  # between ranks that meet the same error


class Trainer:
    """The student in training: what changes from step to step, and nothing else."""

    def __init__(
        self,
        recipe: Recipe,
        inputs: Inputs,
        shape: StepShape,
        num_steps: int,
        folder: RunFolder,
        world: World,
        trackers: Trackers,
    ) -> None:
        self.recipe = recipe
        self.inputs = inputs
        self.shape = shape
        self.num_steps = num_steps
        self.folder = folder
        self.world = world
        self.trackers = trackers
        self.student = build_student(
            recipe,
            world,
            num_token_ids=inputs.processor.num_token_ids,
            num_answer_ids=inputs.processor.num_answer_ids,
        )
        self.optimizer = make_optimizer(self.student, recipe.optimization)
        self.step = 0  # steps done
        self.num_updates = 0
        self.saved_step = -1  # of the newest checkpoint
        self.saved_at_s = time.monotonic()
        self.validated: tuple[int, float | None] = (-1, None)  # the last step that was, and its loss
        self.dropped = [self._dropped(survey) for survey in inputs.surveys().values()]

    def _dropped(self, survey: Survey) -> Dropped:
        logged = dropped_so_far(self.folder.read_metrics(), survey.split.name)
        return Dropped(survey, allowed=self.recipe.data.max_dropped, before=logged)

    def restore(self, checkpoint: Checkpoint | None) -> None:
        """Goes back to where a checkpoint was taken."""
        if checkpoint is None:
            return
        load(checkpoint, student_state(self.student.model, self.optimizer), world=self.world)
        set_num_updates(self.optimizer, checkpoint.facts.num_updates)
        self.step, self.num_updates = checkpoint.facts.step, checkpoint.facts.num_updates
        self.saved_step = self.step

    def check(self) -> None:
        """Proves on two examples that the student computes what is taken for granted.

        Raises   RecipeError  when it does not; the first example's own error, when none can be read
        """
        examples = two_examples(self.inputs.training_source().usable())  # on every rank the same
        self.student.eval()
        packing = self.recipe.optimization.packing
        self.student.check(self.inputs.processor, examples, self.world.device, packing=packing)
        self.student.train()
        reshard(self.student)

    def fit(self, stop: StopRequest) -> bool:
        """Steps to the end; False when it was asked to stop before.  All checkpoints are then whole.

        Raises   TrainingError  where the last validation of a student that was trained is not a number
        """
        if stop.agreed(self.world):
            return False
        try:
            finished = self._steps(stop)
        finally:
            self.folder.checkpoints.wait()  # whatever ends the run: what was saved is kept
        self.world.barrier()
        if finished:
            self._require_a_sound_student()
        return finished

    def _require_a_sound_student(self) -> None:
        """Steps that are left out do not change it; one before them may have made its weights too large."""
        step, loss = self.validated
        if step == self.step and loss is not None and math.isnan(loss):
            raise TrainingError(
                f"step {self.step}: the validation loss is not a number: the student has no finite losses any more. "
                "Nothing is exported. A lower learning rate or a longer warm-up may help; `train-student export "
                f"{self.folder.path} --best` takes the best checkpoint there is"
            )

    def _steps(self, stop: StopRequest) -> bool:
        if self.step == 0:
            if self.world.is_main:
                self.folder.metrics.append(self.inputs.record())
            self._validate()
        elif self._lacks_its_last_validation():
            self._validate_the_last()
        run = self.recipe.run
        with progress(
            total=self.num_steps,
            initial=self.step,
            desc="training",
            unit="step",
            disable=not self.world.is_main,
        ) as bar:
            for step in self._agreed_steps(stop):
                if step.stop:
                    self._save_progress()
                    return False
                self._one_step(step, bar)
                is_last = self.step == self.num_steps
                if is_last or _due(self.step, run.validate_every):
                    with self._saving_first():
                        self._validate()
                if is_last or step.save or _due(self.step, run.checkpoint_every):
                    self._save()
        return True

    def _lacks_its_last_validation(self) -> bool:
        """Of a run whose steps are all done: that it ended by an error, or was to be longer."""
        if self.step < self.num_steps or self.inputs.validation is None:
            return False
        found = self.world.by_main(lambda: self.folder.read_metrics().validations)
        return all(record["step"] != self.step for record in found)

    def _validate_the_last(self) -> None:
        """The checkpoint is there already."""
        self._validate()
        _, loss = self.validated
        if self.world.is_main:
            self.folder.checkpoints.note_validation(self.step, loss)

    def _agreed_steps(self, stop: StopRequest) -> Iterator[Step]:
        """Steps that all ranks are ready for.  What keeps one from beginning (a row, the cache, a worker that died)
        ends the run, between two steps: what was trained so far is saved first.
        """
        fed = self._fed()
        with self._saving_first():
            yield from in_agreement(
                fed,
                self.world,
                stop,
                is_save_due=self._is_save_due,
                on_refused=lambda reasons: self._leave_out(self.dropped[0], reasons),
            )

    @contextmanager
    def _saving_first(self) -> Iterator[None]:
        """An error that all ranks meet costs no step."""
        try:
            yield
        except CheckpointError:  # the disk would not take another one
            raise
        except TeachonceError:
            if self.world.meets(within_s=PATIENCE_S):  # one that is out of memory alone cannot save
                reshard(self.student)  # a validation may have been broken off
                self._save_progress()
                self.folder.checkpoints.wait()
                if self.world.is_main:
                    tqdm.write(f"ended by an error: {self.where_it_stands()}")
            raise

    def _leave_out(self, dropped: Dropped, reasons: list[str]) -> None:
        """Tells and logs rows that cannot be used; called by all ranks.  Raises DataError for one too many."""
        new = dropped.add(reasons)
        if new:
            self._log({"event": EVENT, "step": self.step, "split": dropped.split, "reasons": new})
        for reason in new if self.world.is_main else ():
            tqdm.write(f"note: left out from here on: {reason}")

    def _is_save_due(self) -> bool:
        """By the first rank's clock, which is the one that counts."""
        limit = self.recipe.run.checkpoint_minutes
        return limit is not None and self.world.is_main and time.monotonic() - self.saved_at_s >= 60 * limit

    def _save_progress(self) -> None:
        """A checkpoint between two steps; before the first there is nothing to save."""
        if self.saved_step != self.step and self.step > 0:
            self._save()

    def where_it_stands(self) -> str:
        """How far the run is, for who stopped it."""
        if self.step == 0:
            return "no step is done, and nothing is saved."
        return (
            f"{self.step} of {self.num_steps} steps are done, and saved in {self.folder.checkpoints.folder}."
        )

    def _fed(self) -> Iterator[tuple[list[Microbatch], float]]:
        """The steps' microbatches; a checkpoint that could not be written is an error here, as a row is."""
        fed = feed(
            self.inputs.training_source(),
            training_slots(
                self.shape,
                self._work(self.inputs.train),
                steps=range(self.step, self.num_steps),
                rank=self.world.data_rank,
                num_ranks=self.world.num_data_ranks,
            ),
            num_workers=self.recipe.run.num_workers,
            pin_memory=self.world.device.type == "cuda",
        )
        for step in fed:
            self.folder.checkpoints.raise_failure()
            yield step

    def _work(self, survey: Survey) -> Work:
        return survey.work(self.student.tokens_per_pixel, packed=self.recipe.optimization.packing)

    def _one_step(self, step: Step, bar: tqdm) -> None:
        config = self.recipe.optimization
        begin = time.perf_counter()
        rate = learning_rate(config, step=self.step, num_steps=self.num_steps)
        set_learning_rate(self.optimizer, rate)
        seed_step(self.recipe.run.seed, step=self.step, data_rank=self.world.data_rank)
        with self.inputs.training_source().naming_rows(step.microbatches):
            result = train_step(
                self.student,
                self.optimizer,
                self._with_a_picture(step.microbatches),
                self.world,
                num_positions=step.num_positions,
                num_kept=step.num_kept,
                num_tokens=step.num_tokens,
                max_grad_norm=config.max_grad_norm,
            )
        self.step += 1
        self.num_updates += result.updated
        record = self._record(step, result, rate, step_s=time.perf_counter() - begin + step.wait_s)
        self._log(record)
        if self.world.is_main:
            figures = {"loss": f"{result.losses.loss:.3f}", "data_wait": f"{record['data_wait']:.0%}"}
            if result.losses.router is not None:
                figures["router"] = f"{result.losses.router:.3f}"
            bar.set_postfix(figures, refresh=False)
            bar.update()
        self._require_finite(result)

    def _with_a_picture(self, microbatches: list[Microbatch]) -> list[Microbatch]:
        """Of rows of text alone, in data with pictures: one more, so that the tower's gradient is zero, not missing.

        Its moments then go on as on several ranks, where each microbatch has a picture, and as a resume expects.
        """
        if not self.inputs.train.has_pictures or any(one.has_pictures for one in microbatches):
            return microbatches
        return [*microbatches, self.inputs.training_source().blank_microbatch(microbatches[0].slot)]

    def _require_finite(self, result: StepResult) -> None:
        limit = self.recipe.optimization.max_skipped_steps
        if not result.updated and self.step - self.num_updates > limit:
            raise TrainingError(
                f"step {self.step}: the loss is {result.losses.loss}, the norm of its gradient "
                f"{result.grad_norm}; {self.step - self.num_updates} step(s) are not finite, "
                f"optimization.max_skipped_steps allows {limit}. They have not changed the student; a lower "
                "learning rate or a longer warm-up may help"
            )

    def _record(self, step: Step, result: StepResult, rate: float, *, step_s: float) -> dict[str, Any]:
        losses = result.losses
        return {
            "event": "step",
            "step": self.step,
            "epoch": (self.step - 1) // self.shape.num_steps_per_epoch,
            "num_epochs": self.step / self.shape.num_steps_per_epoch,  # done
            **_named(losses, distils=self.recipe.distils),
            "num_positions": step.num_positions,
            **({} if self.recipe.loss.positions is None else {"num_kept": step.num_kept}),
            "grad_norm": result.grad_norm,
            "learning_rate": rate,
            "updated": result.updated,
            "step_s": step_s,
            "data_wait": step.wait_s / step_s,
            "positions_per_s": step.num_positions / step_s,
            "tokens_per_s": step.num_tokens / step_s,
            "padding": step.padding,
            "waiting": step.waiting,
            "peak_memory_gib": peak_memory_gib(self.world),
        }

    def _validate(self) -> None:
        """Losses over the validation split, logged; nothing where the data have none."""
        if self.inputs.validation is None:
            return
        self.folder.checkpoints.wait()  # workers are forked here, and a fork beside a busy thread may hang
        self.world.barrier()  # the first rank waits longest: it hashes what all have written
        begin = time.perf_counter()
        try:
            found = self._measure()
        except (CacheFormatError, CacheMismatchError) as error:
            if self.inputs.cache is not None:
                raise
            if self.world.is_main:  # the cache is of no use to validation, and training does without it
                tqdm.write(f"note: {no_kl(error)}")
            self.inputs = replace(self.inputs, validation_cache=None)
            found = self._measure()
        losses = found.losses
        record = {"event": "validation", "step": self.step, **_named(losses, distils=self.recipe.distils)}
        record |= {"kl": losses.kl, "teacher_ce_loss": losses.teacher_ce, **found.details()}
        record |= {} if losses.coverage is None else {"soft_ce": losses.soft_ce}
        record["validation_s"] = time.perf_counter() - begin
        self._log(record)
        self.validated = self.step, losses.loss
        if self.world.is_main:
            shown = [("loss", losses.loss if self.recipe.distils else None), ("CE", losses.ce)]
            shown += [("KL to the teacher", losses.kl), ("router", losses.router)]
            shown += [("cross-entropy with the teacher", losses.soft_ce)]
            figures = ", ".join(f"{name} {value:.4f}" for name, value in shown if value is not None)
            tqdm.write(f"step {self.step} of {self.num_steps}: validation {figures}, nats a position")

    def _measure(self) -> Validation:
        assert self.inputs.validation is not None
        slots = pass_slots(
            self._work(self.inputs.validation),
            limits=self.shape.limits,
            rank=self.world.data_rank,
            num_ranks=self.world.num_data_ranks,
        )
        return validate(
            self.student,
            self.inputs.validation_source(),
            slots,
            self.world,
            num_workers=self.recipe.run.num_workers,
            on_refused=lambda reasons: self._leave_out(self.dropped[-1], reasons),
        )

    def _log(self, record: dict[str, Any]) -> None:
        if self.world.is_main:
            self.folder.metrics.append(record)
            self.trackers.log(record)

    def _save(self) -> None:
        validated_step, loss = self.validated
        facts = Facts(
            step=self.step,
            num_updates=self.num_updates,
            num_ranks=self.world.size,
            identity=self.inputs.identity(self.recipe),
            validation_loss=loss if validated_step == self.step else None,
        )
        self.folder.checkpoints.save(student_state(self.student.model, self.optimizer), facts, self.world)
        self.saved_step, self.saved_at_s = self.step, time.monotonic()


def peak_memory_gib(world: World) -> float:
    """Of the device where it has memory of its own, else of this process."""
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _named(losses: Losses, *, distils: bool) -> dict[str, float | int | None]:
    """As the log has them."""
    router = {} if losses.router is None else {"router_loss": losses.router}
    drawn = {} if losses.reverse_kl is None else {"reverse_kl": losses.reverse_kl}
    covered: dict[str, float | None] = {}
    if losses.coverage is not None:  # what reads the log takes kd_loss for KL where no other is given
        covered = {"kl": None, **losses.coverage.to_json()}
    return {
        "loss": losses.loss,
        "ce_loss": losses.ce,
        "kd_loss": losses.kd if distils else None,
        **router,
        **drawn,
        "num_positions": losses.num_positions,
        **covered,
    }


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
