"""How a tiny checkpoint is trained: tower, drills, questions, pruned clips.

1. *Tower*: the vision tower and projector name the mark of every cell, by linear heads that are
   thrown away.
2. *Pool*: the finished tower encodes a pool of scenes once; it stays frozen from here on.
3. *Language*: the language model learns to look marks up, first by drills, then by questions.
4. *Near misses*: whole clips alternate with clips pruned to the tokens that resemble a question,
   because answering from selected tokens is denser in near misses than any clip.
5. *Selected*: most clips are pruned for their first question, as selection prunes a long video, and
   are as long as what a budget leaves of one.

Every picture passes through the h264 encoder and decoder and the family's real processor. No clip
holds more than sixteen pictures of video; a pruned clip holds no more tokens than
``Segment.tokens``. Every step draws from a generator of its own, so that a resumed run continues as
an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .batches import IGNORE, Batch, Scribe, embed
from .clips import Pool, ask, drill, film_scenes, pruned_clip, whole_clip
from .models import CELLS, Family
from .questions import RETRIEVAL, TASKS, split_seed
from .scenes import EMPTY, SIZES

#: Scenes filmed at once, as one video.
REEL = 256
_TOWER, _POOL, _CLIPS, _HELD_OUT = range(4)


@dataclass(frozen=True)
class Segment:
    """A stretch of steps on one kind of clip.

    Attributes
    ----------
    kind : str
        "drill" or "questions".
    steps, batch, length : int
        Steps, clips a step, and tokens a clip with its text.
    pictures : tuple of int
        Pictures of video a clip may have, drawn evenly.
    turns : int
        Most questions, or named marks, a clip.
    pruned : float
        Share of the batches whose clips are pruned.
    tokens : int
        Ranked tokens a pruned clip keeps.
    focused : float
        Share of the pruned clips that are pruned for one question. These keep between a quarter
        of ``tokens`` and all of them.
    tasks : tuple of str
        Tasks to ask, in proportion.
    gaps : int
        Most words of questions between the words of a drill.
    """

    kind: Literal["drill", "questions"]
    steps: int
    batch: int
    length: int
    pictures: tuple[int, ...]
    turns: int
    pruned: float = 0.0
    tokens: int = 0
    focused: float = 0.0
    tasks: tuple[str, ...] = ()
    gaps: int = 0


@dataclass(frozen=True)
class Phase:
    """Segments that share an optimiser and one cosine of the learning rate."""

    name: str
    rate: float
    warmup: int
    segments: tuple[Segment, ...]

    @property
    def steps(self) -> int:
        """Steps of all segments."""
        return sum(segment.steps for segment in self.segments)

    def at(self, step: int) -> Segment:
        """Return the segment that a step belongs to."""
        for segment in self.segments:
            if step < segment.steps:
                return segment
            step -= segment.steps
        raise IndexError(step)

    def rate_at(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, then a cosine to a fiftieth."""
        cosine = 0.5 * (1 + np.cos(np.pi * step / self.steps))
        return float(self.rate * min(1.0, (step + 1) / self.warmup) * (0.02 + 0.98 * cosine))


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run but its seed.

    Attributes
    ----------
    tower_steps, tower_scenes, tower_rate : int, int, float
        Steps of the tower, scenes a step, and peak learning rate.
    pool_scenes : int
        Scenes of the pool.
    phases : tuple of Phase
        Training of the language model.
    text : dict
        Overrides of the language model's config.
    """

    tower_steps: int
    tower_scenes: int
    tower_rate: float
    pool_scenes: int
    phases: tuple[Phase, ...]
    text: dict[str, Any]


_MIXED_TASKS = (*RETRIEVAL, *RETRIEVAL, *TASKS)


def default_recipe(family: Family) -> Recipe:
    """Return the recipe of the committed checkpoints."""
    # Looking marks up takes M-RoPE longer to get right than plain positions, and the coarser
    # tokens of SigLIP, whose patches LLaVA-Video projects before pooling them, longest of all.
    questions = {"qwen2_5_vl": 600, "internvl": 350, "llava_video": 900}[family.name]
    drills = 400 if family.name == "llava_video" else 250
    towers = 800 if family.name == "llava_video" else 300
    slots, ranked = family.frame_slots()
    # A frame of InternVL and LLaVA-Video is one picture and has tokens beside its cells.
    room = len(slots) * 16 // family.pictures_per_frame - 32
    # Tags and newlines are ranked like cells, and headers stay: more tokens to answer from.
    tokens = 64 if len(slots) == CELLS else 96
    headers = ranked.count(False)
    short, long = 8, 16
    return Recipe(
        tower_steps=towers,
        tower_scenes=160,
        tower_rate=2.5e-3,
        pool_scenes=80 * REEL,
        phases=(
            Phase(
                "language",
                2e-3,
                60,
                (
                    Segment("drill", drills, 32, 100 + room // 2, (short,), 20),
                    Segment("drill", drills, 24, 100 + room, (long,), 20),
                    Segment(
                        "questions", questions, 24, 160 + room, (short, long), 8, tasks=RETRIEVAL
                    ),
                ),
            ),
            Phase(
                "near_misses",
                7e-4,
                20,
                (
                    Segment(
                        "questions",
                        500,
                        24,
                        160 + room,
                        (2, 4, 8, 12, long),
                        8,
                        pruned=0.5,
                        tokens=48,
                        tasks=_MIXED_TASKS,
                    ),
                ),
            ),
            Phase(
                "selected",
                5e-4,
                10,
                (
                    Segment(
                        "questions",
                        200,
                        16,
                        90 + tokens * (1 + headers),
                        (4, 8, long),
                        4,
                        pruned=0.75,
                        tokens=tokens,
                        focused=0.85,
                        tasks=RETRIEVAL,
                    ),
                ),
            ),
        ),
        text={},
    )


def student_recipe(family: Family) -> Recipe:
    """Return the recipe of a student: half the layers, narrower, on the checkpoint's tower.

    It learns by the same drills and questions: a small model that never learned to look at the
    question makes a useless selector, however well it imitates a ranking.
    """
    whole = default_recipe(family)
    drills, longer, questions = whole.phases[0].segments
    # Qwen2.5-VL's passes from drills to questions at once, the others' not without a bridge.
    bridge = 0 if family.name == "qwen2_5_vl" else 150
    segments = (
        replace(drills, steps=300),
        replace(longer, steps=300),
        replace(questions, kind="drill", steps=bridge, turns=12, tasks=(), gaps=4),
        replace(questions, steps=500),
    )
    return replace(
        whole,
        tower_steps=150,
        phases=(replace(whole.phases[0], segments=segments),),
        text={
            "hidden_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "intermediate_size": 256,
        },
    )


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
    *,
    compiled: bool = True,
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

    run = torch.compile(answer, dynamic=False) if compiled else answer
    for step in range(start, phase.steps):
        rng = _generator(seed, _CLIPS + 10 * len(phase.name), step)
        batch = make_batch(scribe, pool, phase.at(step), rng)
        embeddings = embed(batch, table.weight, pool.features, family.newline(model))
        logits = run(embeddings, batch.positions)
        learned = batch.targets != IGNORE
        chosen, targets = logits[learned], batch.targets[learned]
        loss = nn.functional.cross_entropy(chosen, targets)
        _update(optimizer, parameters, loss, phase.rate_at(step))
        answers = targets != scribe.turn_end
        right = (chosen.argmax(-1) == targets)[answers].float().mean()
        yield step, loss.item(), right.item()


def make_batch(scribe: Scribe, pool: Pool, segment: Segment, rng: np.random.RandomState) -> Batch:
    """Draw the clips of one step and what is asked of them."""
    pruned = rng.random_sample() < segment.pruned
    clips, texts = [], []
    for _ in range(segment.batch):
        if pruned:
            focused = bool(segment.focused) and rng.random_sample() < segment.focused
            tokens = segment.tokens
            if focused:
                tokens = int(rng.randint(segment.tokens // 4, segment.tokens + 1))
            clip = pruned_clip(
                pool,
                rng,
                tokens=tokens,
                # So many that near misses alone can fill a clip that is pruned for a question.
                frames=int(rng.randint(tokens // 4, tokens + 1)) * (3 if focused else 1),
                ranked=scribe.ranked,
                cell_slots=scribe.cell_slots,
                focused=focused,
            )
        else:
            pictures = segment.pictures[rng.randint(len(segment.pictures))]
            clip = whole_clip(
                pool,
                rng,
                frames=max(1, pictures // scribe.family.pictures_per_frame),
                slots=len(scribe.slots),
            )
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
