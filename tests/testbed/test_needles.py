"""Needle tokens: where the sidecar says they are is where the tower shows them."""

import pytest
import torch

import flexselect
from flexselect.inference.methods import Full
from flexselect.testbed.locate import FAMILIES
from flexselect.testbed.models import family_of
from flexselect.testbed.needles import needle_mask
from flexselect.testbed.questions import compose
from flexselect.testbed.scenes import EMPTY
from flexselect.testbed.videos import draw_plot, plot_questions, write_video


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_tokens_of_the_mask_change_when_the_needle_goes(name, tmp_path):
    family = family_of(name)
    torch.manual_seed(0)
    model = family.build(num_hidden_layers=1).eval()
    plot = compose(3, 6, ["number"])
    (question,) = plot_questions(plot, 2)
    needle = plot.questions[0].needles[0]
    seen = []
    for index in range(2):
        path = tmp_path / f"{index}.mp4"
        write_video(path, draw_plot(plot), fps=2)
        sizes = {"min_pixels": 3136, "max_pixels": 3136} if name == "qwen2_5_vl" else {}
        video = flexselect.open_video(
            model, family.processor, path, method=Full(), frames=12, **sizes
        )
        encoded = video.encoded(
            [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "red ?"}]}], 0
        )
        layout = encoded.prompt.layout
        shown = torch.zeros(len(layout), family_width(model))
        shown[layout.feature] = encoded.features.model.float()
        seen.append(shown[layout.visual])
        plot.cells[needle.scene, needle.row, needle.column] = EMPTY
    mask = needle_mask(family, question, range(12))
    assert len(mask) == len(seen[0])
    change = (seen[0] - seen[1]).abs().mean(1)
    assert mask.sum() == 2 // family.pictures_per_frame
    frames = mask.view(12 // family.pictures_per_frame, -1)
    changed = change.view_as(frames)
    assert (changed[frames.any(1)].argmax(1) == frames[frames.any(1)].int().argmax(1)).all()
    assert changed[frames.any(1)].max() > 3 * changed[~frames.any(1)].max()


def family_width(model):
    return model.config.text_config.hidden_size


def test_a_needle_that_sampling_missed_marks_nothing():
    family = family_of("internvl")
    plot = compose(3, 6, ["number"])
    (question,) = plot_questions(plot, 2)
    others = [f for f in range(12) if f not in question.needles[0].frames]
    mask = needle_mask(family, question, others)
    assert len(mask) == 10 * 6
    assert not mask.any()
