"""The trainer: Hugging Face's, with lessons for batches, the rank losses, and files of our own.

The tower and an online teacher run without gradients in the training process; gradients flow
through the student's projector and its layers below the last. Every run is one pass over a list of
samples that is drawn beforehand for all epochs, so that where a run stands is one number.

Checkpoints appear by a rename when they are whole. Weights, optimiser and schedule are safetensors
and JSON; only DeepSpeed and FSDP write their sharded states in their own formats.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from ..core.errors import CheckpointError, FlexSelectError
from ..core.selection import top_tokens
from ..core.soft_rank import rank
from ..core.spearman import selector_loss
from ..inference.features import Progress
from .lessons import Schoolbook
from .optimizer_state import load_optimizer, save_optimizer
from .recipe import Recipe
from .student import Lesson, Ranking, Student, save_selector

logger = logging.getLogger(__name__)

#: Smallest relevance whose logarithm is told apart: far below any that a softmax in float32 gives.
_TINY = 1e-30
_WHOLE = "trainer_state.json"


class SelectorTrainer(Trainer):
    """Trains a student on lessons.

    Parameters
    ----------
    student : what is trained.
    recipe : how.
    lessons : the training set.
    held_out : like ``lessons``, for evaluation; the same on every process.
    order : indices into ``lessons`` of every step of all epochs, in order.
    teach : turns entries into lessons, without gradients.
    out : folder of the checkpoints.
    report_to : where Trainer logs to, such as ("tensorboard",).
    progress : called with ("train", step, steps).
    more : further arguments of TrainingArguments, such as ``deepspeed``.
    """

    control: Any

    def __init__(
        self,
        student: Student,
        recipe: Recipe,
        lessons: Schoolbook,
        held_out: Schoolbook,
        order: Sequence[int],
        teach: Callable[[Sequence[Any]], list[Lesson]],
        out: Path,
        *,
        report_to: Sequence[str] = (),
        progress: Progress | None = None,
        **more: Any,
    ) -> None:
        self.recipe = recipe
        self.book, self.held_out = lessons, held_out
        self.order = list(order)
        self.teach = teach
        per_step = recipe.samples_per_device * recipe.accumulation
        arguments = TrainingArguments(
            output_dir=str(out),
            per_device_train_batch_size=recipe.samples_per_device,
            gradient_accumulation_steps=recipe.accumulation,
            num_train_epochs=1,
            learning_rate=recipe.learning_rate,
            lr_scheduler_type="cosine",
            weight_decay=recipe.weight_decay,
            adam_beta1=recipe.betas[0],
            adam_beta2=recipe.betas[1],
            max_grad_norm=recipe.clip,
            bf16=recipe.bf16,
            logging_steps=1,
            logging_nan_inf_filter=False,
            eval_strategy="steps",
            eval_steps=recipe.evaluate_every,
            save_strategy="steps",
            save_steps=recipe.evaluate_every,
            metric_for_best_model="recall_at_k",
            greater_is_better=True,
            dataloader_num_workers=recipe.workers,
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
            disable_tqdm=True,
            seed=recipe.seed,
            report_to=list(report_to),
            use_cpu=student.architecture.model.device.type == "cpu",
            **more,
        )
        self.steps = len(self.order) // (per_step * arguments.world_size)
        if self.steps < 1:
            raise FlexSelectError(
                f"One step takes {per_step * arguments.world_size} samples, but there are only "
                f"{len(self.order)}. Take more data, or fewer samples a step."
            )
        arguments.warmup_steps = math.ceil(recipe.warmup * self.steps)
        if recipe.checkpointing:
            recompute(student.selector.language_model)
        super().__init__(
            model=student,
            args=arguments,
            train_dataset=lessons,
            eval_dataset=held_out,  # only its presence counts: see `evaluate`
            data_collator=_as_batch,
            callbacks=[_Show(progress)],
        )
        # Every step has its row in the log; they belong in TensorBoard, not on standard output.
        self.remove_callback(PrinterCallback)
        # Trainer divides the loss of a batch by the batches of a step: ours is a mean.
        self.model_accepts_loss_kwargs = False

    # -- data and loss -----------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of this process: of every step, its stretch of the order."""
        size, place, processes = (
            self.args.per_device_train_batch_size,
            self.args.process_index,
            self.args.world_size,
        )
        batches = []
        for index in range(self.steps * self.args.gradient_accumulation_steps):
            start = (index * processes + place) * size
            batches.append(self.order[start : start + size])
        workers = self.args.dataloader_num_workers
        return DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=_as_batch,
            num_workers=workers,
            prefetch_factor=2 if workers else None,
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Rank the lessons of a batch and compare with the teacher; all lessons weigh the same."""
        lessons = self._lessons_of(self.book, inputs)
        rankings = model(lessons)
        loss = torch.stack([(self.losses(r) * r.weight).sum() for r in rankings]).sum()
        return (loss, rankings) if return_outputs else loss

    def _lessons_of(self, book: Schoolbook, batch: dict[str, Any]) -> list[Lesson]:
        """Return the lessons of a batch, and note what was damaged on the way to it."""
        for page in batch["entries"]:
            book.note(page.damaged)
        return self.teach([page.entry for page in batch["entries"]])

    def losses(self, ranking: Ranking) -> Tensor:
        """Loss of each set of a ranking: float32 ``(sets,)``."""
        pred, target = ranking.pred, ranking.target
        if self.recipe.log_scores:
            pred, target = pred.clamp(min=_TINY).log(), target.clamp(min=_TINY).log()
        return selector_loss(
            pred,
            target,
            terms=self.recipe.loss,
            temperature=self.recipe.temperature,
            top_fraction=self.recipe.top_fraction,
            reduction="none",
        )

    # -- evaluation --------------------------------------------------------------------------

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Measure loss, rho and recall@K against the teacher on the held-out lessons.

        Every process takes its share; the means are over all sets.
        """
        model = self.model_wrapped if self.is_deepspeed_enabled else self.model
        model.eval()
        place, processes = self.args.process_index, self.args.world_size
        total = torch.zeros(5, dtype=torch.float64)
        # Sharded parameters are gathered by all processes together: none may stop early.
        rounds = -(-len(self.held_out) // processes)
        turns = [place + processes * index for index in range(rounds)]
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            self.held_out,
            batch_sampler=[[turn % len(self.held_out)] for turn in turns],
            collate_fn=_as_batch,
            num_workers=workers,
        )
        with torch.no_grad(), self.compute_loss_context_manager():
            for turn, batch in zip(turns, loader, strict=True):
                for ranking in model(self._lessons_of(self.held_out, batch)):
                    if turn < len(self.held_out):
                        total += self._measure(ranking)
        model.train()
        if processes > 1:
            total = self.accelerator.reduce(total.to(self.args.device), "sum").cpu()
        sets = total[0].clamp(min=1)
        names = ("loss", "spearman", "recall_at_k", "top_1_recall")
        metrics = {
            f"{metric_key_prefix}_{name}": float(value / sets)
            for name, value in zip(names, total[1:], strict=True)
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _measure(self, ranking: Ranking) -> Tensor:
        """Sum over sets of: one, loss, rho, recall@K, whether the teacher's best is in the K."""
        found = torch.zeros(5, dtype=torch.float64)
        for loss, quality in zip(
            self.losses(ranking).cpu(),
            quality_of(ranking.pred, ranking.target, self.recipe.top_fraction),
            strict=True,
        ):
            found += torch.tensor([1.0, float(loss), *quality], dtype=torch.float64)
        return found

    # -- files -------------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint beside its place and move it there when it is whole."""
        out = Path(self.args.output_dir)
        draft = out / ".partial"
        name = f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(draft, ignore_errors=True)
        self._wait()
        self.args.output_dir = str(draft)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir = str(out)
        self._wait()
        if self.args.should_save:
            for path in (draft / name).rglob("*"):
                if path.is_file():
                    _sync(path)
            if (out / name).exists():
                os.replace(out / name, draft / "before")
            os.replace(draft / name, out / name)
            _sync(out)
            shutil.rmtree(draft, ignore_errors=True)
            keep = {self.state.global_step, self.state.best_global_step}
            for step, folder in checkpoints(out):
                if step not in keep:
                    shutil.rmtree(folder)
        self._wait()

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the selector's weights, gathered by the caller where they are sharded."""
        weights = None
        if state_dict is not None:
            weights = {name.removeprefix("selector."): v for name, v in state_dict.items()}
        save_selector(
            self.model.selector, Path(output_dir or self.args.output_dir), weights=weights
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read what `_save` wrote; DeepSpeed and FSDP read their own."""
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        weights = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        self.model.selector.load_state_dict(weights)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            save_optimizer(self.optimizer, self.lr_scheduler, Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            load_optimizer(self.optimizer, self.lr_scheduler, Path(checkpoint))

    def _save_rng_state(self, output_dir: str) -> None:
        """Write nothing: no step draws random numbers, the order is drawn beforehand."""
        os.makedirs(output_dir, exist_ok=True)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Read nothing; see `_save_rng_state`."""

    def _wait(self) -> None:
        if self.args.world_size > 1:
            torch.distributed.barrier()


def recompute(text: Any) -> None:
    """Let the layers of a text model recompute their activations in the backward pass.

    Written out because the stock method's name differs between the versions we support.
    """
    for layer in text.layers:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


@dataclass(frozen=True)
class Quality:
    """How well one set is ranked: rho, recall@K of the teacher's top, and of its best token."""

    spearman: float
    recall_at_k: float
    top_1_recall: float

    def __iter__(self) -> Any:
        return iter((self.spearman, self.recall_at_k, self.top_1_recall))


def quality_of(pred: Tensor, target: Tensor, top_fraction: float) -> list[Quality]:
    """Compare rankings of sets, ``(sets, visual)`` each, with their teacher's."""
    found = []
    ours, theirs = rank(pred.double()), rank(target.double())
    for mine, wanted, a, b in zip(
        pred.float().cpu(), target.float().cpu(), ours.cpu(), theirs.cpu(), strict=True
    ):
        a, b = a - a.mean(), b - b.mean()
        norm = a.norm() * b.norm()
        k = max(1, round(top_fraction * len(mine)))
        top, best = top_tokens(mine, k), top_tokens(wanted, k)
        hits = int(torch.isin(best, top).sum())
        found.append(
            Quality(
                float(a @ b / norm) if norm > 0 else 0.0,
                hits / k,
                float(torch.isin(top_tokens(wanted, 1), top).all()),
            )
        )
    return found


def checkpoints(out: Path) -> list[tuple[int, Path]]:
    """List the whole checkpoints of a run by step, earliest first."""
    found = []
    for path in out.glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and (path / _WHOLE).is_file():
            found.append((int(step), path))
    return sorted(found)


def best_checkpoint(out: Path) -> tuple[int, Path]:
    """Return the checkpoint of best recall@K of a finished run."""
    found = dict(checkpoints(out))
    if not found:
        raise CheckpointError(f"{out} holds no checkpoint of a training.")
    last = max(found)
    best = json.loads((found[last] / _WHOLE).read_text()).get("best_global_step")
    step = best if best in found else last
    return step, found[step]


class _Show(TrainerCallback):
    """Reports every step to a progress display."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None and state.is_world_process_zero:
            self._progress("train", state.global_step, state.max_steps)


def _as_batch(entries: list[Any]) -> dict[str, Any]:
    """Keep entries as they are, under a name, as Trainer wants a mapping."""
    return {"entries": entries}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
