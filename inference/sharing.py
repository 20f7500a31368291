"""Several processes share the sets of one video and end up with the same tokens.

Every process has the whole prompt and its features, scores each ``world size``-th set, and tells
the others only its winners: two numbers a kept token, however long the video is.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from torch import Tensor

from ..core.errors import FlexSelectError, OptionError
from ..core.layout import Prompt
from ..core.selection import select_from_sets
from .scoring import FrameSet


@dataclass(frozen=True)
class Share:
    """One process among those that share.

    Attributes
    ----------
    rank, world : its number, and how many there are.
    """

    rank: int
    world: int

    @classmethod
    def of_this_process(cls) -> Share:
        """Return this process's share, or raise `OptionError` where there is no process group."""
        if not (distributed.is_available() and distributed.is_initialized()):
            raise OptionError(
                "share_sets needs the processes of torch.distributed. Start them with torchrun and "
                "call torch.distributed.init_process_group first, or leave share_sets out."
            )
        return cls(distributed.get_rank(), distributed.get_world_size())

    def sets(self, sets: list[FrameSet]) -> list[FrameSet]:
        """Return the sets that this process scores."""
        return sets[self.rank :: self.world]

    def winners(
        self, prompt: Prompt, sets: list[FrameSet], scores: Tensor, quotas: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Choose the best of the own sets and exchange them with the other processes.

        Parameters
        ----------
        prompt : the same in every process.
        sets, quotas : all of the prompt's, the same in every process.
        scores : float32 ``(visual,)``, right for the tokens of the own sets; may be empty for a
            process without sets.

        Returns
        -------
        int64 ``(kept,)`` ascending, and float32 ``(visual,)`` scores: a winner's own, 0 elsewhere.

        Raises
        ------
        FlexSelectError
            The processes were asked different things, or a relevance is not finite.
        """
        self._check_same(prompt, quotas)
        own = self.sets(sets)
        members = [part.members.to(scores.device) for part in own]
        kept = select_from_sets(scores, members, quotas[self.rank :: self.world])
        # Quotas alone tell every process how much each other one sends.
        counts = [sum(quotas[rank :: self.world]) for rank in range(self.world)]
        mine = torch.zeros(max(counts) + 1, 2, dtype=torch.float64)
        # A float64 holds every index and every float32 exactly. The last row says all is well, so
        # that all processes fail together.
        mine[: len(kept), 0] = kept.cpu().double()
        mine[: len(kept), 1] = scores[kept].cpu().double()
        mine[-1] = float(bool(scores.isfinite().all()))
        parts = _gathered(mine, self.world)
        if not all(bool(part[-1, 0]) for part in parts):
            raise FlexSelectError(
                "Relevance is not finite in one of the processes: the model overflowed below its "
                "reference layer. Load it in bfloat16 or float32 instead of float16."
            )
        rows = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
        everyone = torch.zeros(prompt.num_visual)
        everyone[rows[:, 0].long()] = rows[:, 1].float()
        return rows[:, 0].long().sort().values, everyone

    def _check_same(self, prompt: Prompt, quotas: Sequence[int]) -> None:
        key = zlib.crc32(prompt.layout.ids.numpy().tobytes())
        mine = torch.tensor([key, prompt.num_visual, len(quotas), sum(quotas)]).double()
        if any(not torch.equal(part, mine) for part in _gathered(mine, self.world)):
            raise FlexSelectError(
                "The processes that share a video's sets were not asked the same about the same "
                "video with the same budget. Give all of them the same prompt, or leave share_sets "
                "out."
            )


def _gathered(mine: Tensor, world: int) -> list[Tensor]:
    """Exchange a host tensor of one shape with every process."""
    # NCCL moves only what is on a GPU.
    device = torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
    parts = [torch.empty_like(mine, device=device) for _ in range(world)]
    distributed.all_gather(parts, mine.to(device))
    return [part.cpu() for part in parts]
