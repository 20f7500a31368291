"""The steps of a recipe: the tower's, the pool, and the language model's.

Every step of a phase draws from a generator of its own, so that a resumed run continues as an
uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .batches import IGNORE, Batch, Scribe, embed
from .clips import Clip, Pool, ask, drill, film_scenes, pruned_clip, whole_clip
from .models import Family
from .questions import split_seed
from .recipe import REEL, Phase, Recipe, Segment
from .rehearsal import Rehearsal
from .scenes import EMPTY, SIZES

_TOWER, _POOL, _CLIPS, _HELD_OUT = range(4)


def train_tower(
    family: Family,
    model: Any,
    recipe: Recipe,
    seed: int,
    report: Callable[[str], None],
) -> float:
    """Teach what of the tower is not frozen to name marks.

    Returns
    -------
    float
        The share of held-out marks it names whole.
    """
    torch.manual_seed(seed)
    hidden = model.config.text_config.hidden_size
    head = nn.Linear(hidden, sum(SIZES) + 1)
    parameters = [p for part in family.tower(model) for p in part.parameters() if p.requires_grad]
    parameters += list(head.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.02, betas=(0.9, 0.98))
    phase = Phase(
        "tower",
        recipe.tower_rate,
        max(1, recipe.tower_steps // 10),
        (Segment("drill", recipe.tower_steps, 0, 0, (), 0),),
    )
    for step in range(recipe.tower_steps):
        features, marks = _filmed(
            family, model, recipe.tower_scenes, _generator(seed, _TOWER, step), filled=0.8
        )
        loss, right = _naming_loss(head, features, marks)
        # Visual tokens should have the scale of embeddings, or the language model starts deaf.
        loss = loss + 1e-3 * (features.pow(2).mean() - 1).clamp(min=0)
        _update(optimizer, parameters, loss, phase.rate_at(step))
        if step % 50 == 0 or step == recipe.tower_steps - 1:
            report(
                f"tower {step + 1}/{recipe.tower_steps} loss {loss.item():.3f} right {right:.3f}"
            )
    with torch.no_grad():
        features, marks = _filmed(family, model, 1024, _generator(seed, _HELD_OUT, 0), filled=0.6)
        return _naming_loss(head, features, marks)[1]


@torch.no_grad()
def build_pool(family: Family, model: Any, scenes: int, seed: int) -> Pool:
    """Film and encode the scenes that training clips are made of."""
    features, marks = [], []
    for reel in range(scenes // REEL):
        seen, shown = _filmed(family, model, REEL, _generator(seed, _POOL, reel), filled=0.6)
        features.append(seen)
        marks.append(shown)
    return Pool(torch.cat(features), np.concatenate(marks))


def train_language(
    family: Family,
    model: Any,
    pool: Pool,
    phase: Phase,
    optimizer: torch.optim.Optimizer,
    seed: int,
    start: int = 0,
) -> Iterator[tuple[int, float, float]]:
    """Run a phase from step ``start``; yields step, loss and share of right answers.

    The optimiser's state belongs to the caller, who saves and restores it.
    """
    scribe = Scribe(family)
    language, table = model.model.language_model, model.get_input_embeddings()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def answer(embeddings: Tensor, positions: Tensor) -> Tensor:
        # A mask for each kind of layer, all of them None: plain causal attention whatever the
        # positions, which transformers would otherwise inspect for packed sequences.
        states = language(
            inputs_embeds=embeddings,
            position_ids=positions,
            attention_mask={"full_attention": None},
            use_cache=False,
        ).last_hidden_state
        return nn.functional.linear(states, table.weight)

    rehearsals = {
        segment.selecting: Rehearsal(family, model, pool, scribe, segment.selecting)
        for segment in phase.segments
        if segment.selecting is not None
    }
    for step in range(start, phase.steps):
        # Of the length of its name: "language" and "selected" draw the same numbers, and make
        # other clips of them. The committed checkpoints were trained so.
        rng = _generator(seed, _CLIPS + 10 * len(phase.name), step)
        segment = phase.at(step)
        rehearsal = rehearsals[segment.selecting] if segment.selecting is not None else None
        batch = make_batch(scribe, pool, segment, rng, rehearsal)
        embeddings = embed(batch, table.weight, pool.features, family.newline(model))
        logits = answer(embeddings, batch.positions)
        learned = batch.targets != IGNORE
        chosen, targets = logits[learned], batch.targets[learned]
        loss = nn.functional.cross_entropy(chosen, targets)
        _update(optimizer, parameters, loss, phase.rate_at(step))
        answers = targets != scribe.turn_end
        right = (chosen.argmax(-1) == targets)[answers].float().mean()
        yield step, loss.item(), right.item()


def make_batch(
    scribe: Scribe,
    pool: Pool,
    segment: Segment,
    rng: np.random.RandomState,
    rehearsal: Rehearsal | None = None,
) -> Batch:
    """Draw the clips of one step and what is asked of them; ``rehearsal`` selects where it may."""
    clips, texts = [], []
    for clip in _draw_clips(scribe, pool, segment, rng, rehearsal):
        clips.append(clip)
        if segment.kind == "drill":
            named = drill(pool, clip, scribe.cell_slots, rng, segment.turns, gaps=segment.gaps)
            texts.append(scribe.drill(named))
        else:
            turns = ask(
                pool, clip, scribe.cell_slots, rng, tasks=segment.tasks, count=segment.turns
            )
            texts.append(scribe.chat(turns))
    return scribe.batch(pool, clips, texts, segment.length)


def _draw_clips(
    scribe: Scribe,
    pool: Pool,
    segment: Segment,
    rng: np.random.RandomState,
    rehearsal: Rehearsal | None,
) -> Iterator[Clip]:
    """Draw the clips of one step, all of one kind: selected, pruned or whole."""
    selecting = segment.selecting
    if rehearsal is not None and selecting is not None and rng.random_sample() < selecting.share:
        budget = int(rng.choice(selecting.budgets))
        for _ in range(segment.batch):
            yield rehearsal.clip(rng, budget)
        return
    pruned = rng.random_sample() < segment.pruned
    for _ in range(segment.batch):
        if pruned:
            yield pruned_clip(
                pool,
                rng,
                tokens=segment.tokens,
                frames=int(rng.randint(segment.tokens // 4, segment.tokens + 1)),
                ranked=scribe.ranked,
                cell_slots=scribe.cell_slots,
            )
        else:
            pictures = segment.pictures[rng.randint(len(segment.pictures))]
            yield whole_clip(
                pool,
                rng,
                frames=max(1, pictures // scribe.family.pictures_per_frame),
                slots=len(scribe.slots),
            )


def language_optimizer(family: Family, model: Any) -> torch.optim.AdamW:
    """Build the optimiser of the language model, and of a newline embedding if there is one."""
    parameters = list(model.model.language_model.parameters())
    newline = family.newline(model)
    if newline is not None:
        parameters.append(newline)
    matrices = [p for p in parameters if p.ndim > 1]
    vectors = [p for p in parameters if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": 0.05},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def _filmed(
    family: Family, model: Any, scenes: int, rng: np.random.RandomState, *, filled: float
) -> tuple[Tensor, Any]:
    """Film random scenes and encode them: ``(scenes, looks, cells, hidden)``, and their marks."""
    mixed = family.pictures_per_frame > 1
    pictures, marks = film_scenes(scenes, rng, filled=filled, mixed=mixed)
    return family.encode(model, pictures).unflatten(0, (scenes, -1)), marks


def _naming_loss(head: nn.Linear, features: Tensor, marks: Any) -> tuple[Tensor, float]:
    """Loss of naming every cell, and the share of marks named right in all attributes."""
    seen = torch.from_numpy(marks)[:, None].expand(*features.shape[:-1], 3)
    there = seen[..., 0] != EMPTY
    logits = head(features)
    *named, present = logits.split([*SIZES, 1], dim=-1)
    loss = nn.functional.binary_cross_entropy_with_logits(present[..., 0], there.float())
    right = torch.ones(int(there.sum()), dtype=torch.bool)
    for axis, scores in enumerate(named):
        loss = loss + nn.functional.cross_entropy(scores[there], seen[there][:, axis])
        right &= scores[there].argmax(-1) == seen[there][:, axis]
    return loss, right.float().mean().item()


def _update(
    optimizer: torch.optim.Optimizer, parameters: list[Any], loss: Tensor, rate: float
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


def _generator(seed: int, purpose: int, step: int) -> np.random.RandomState:
    """Make the generator of one step, from the seeds of the training split alone."""
    return np.random.RandomState([split_seed("train", seed), purpose, step])
