"""Needle tokens: where the sidecar says they are is where the tower shows them."""

from dataclasses import replace

import pytest
import torch

import flexselect
from flexselect.inference.methods import Full
from flexselect.testbed.locate import FAMILIES
from flexselect.testbed.models import family_of
from flexselect.testbed.questions import compose
from flexselect.testbed.scenes import EMPTY
from flexselect.testbed.videos import NeedleSpot, draw_plot, plot_questions, write_video
from flexselect.visualization.needles import needle_tokens


def open_plot(name, plot, path, frames):
    """Open a plot's video with an untrained model of one layer, the same every time."""
    family = family_of(name)
    torch.manual_seed(0)
    model = family.build(num_hidden_layers=1).eval()
    write_video(path, draw_plot(plot), fps=2)
    sizes = {"min_pixels": 3136, "max_pixels": 3136} if name == "qwen2_5_vl" else {}
    return flexselect.open_video(
        model, family.processor, path, method=Full(), frames=frames, **sizes
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_marked_tokens_change_when_the_needle_goes(name, tmp_path):
    plot = compose(3, 6, ["number"])
    (question,) = plot_questions(plot, 2)
    needle = plot.questions[0].needles[0]
    seen = []
    for index in range(2):
        video = open_plot(name, plot, tmp_path / f"{index}.mp4", 12)
        encoded = video.encoded(
            [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "red ?"}]}], 0
        )
        layout = encoded.prompt.layout
        width = video.engine.model.config.text_config.hidden_size
        shown = torch.zeros(len(layout), width)
        shown[layout.feature] = encoded.features.model.float()
        seen.append(shown[layout.visual])
        plot.cells[needle.scene, needle.row, needle.column] = EMPTY
    marked = needle_tokens(video, question)
    assert len(marked) == len(seen[0])
    change = (seen[0] - seen[1]).abs().mean(1)
    per_frame = video.engine.architecture.pictures_per_frame
    assert marked.sum() == 2 // per_frame
    frames = marked.view(12 // per_frame, -1)
    changed = change.view_as(frames)
    assert (changed[frames.any(1)].argmax(1) == frames[frames.any(1)].int().argmax(1)).all()
    assert changed[frames.any(1)].max() > 3 * changed[~frames.any(1)].max()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_picture_needle_marks_its_frame_and_one_that_sampling_missed_nothing(name, tmp_path):
    plot = compose(3, 6, ["number"])
    (question,) = plot_questions(plot, 2)
    video = open_plot(name, plot, tmp_path / "v.mp4", 4)
    looked = video.pictures.tolist()
    missed = tuple(set(range(12)) - set(looked))
    elsewhere = replace(question.needles[0], frames=missed)
    assert not needle_tokens(video, replace(question, needles=(elsewhere,))).any()
    picture = NeedleSpot((looked[-1],), None, None, None, "picture")
    per_frame = video.engine.architecture.pictures_per_frame
    frames = needle_tokens(video, replace(question, needles=(picture,))).view(4 // per_frame, -1)
    assert frames[-1].all()
    assert not frames[:-1].any()
