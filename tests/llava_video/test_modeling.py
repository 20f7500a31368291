"""The model is the reference's LLaVA-Video in every number, and otherwise the stock class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

from flexselect.core.errors import OptionError, PromptError
from flexselect.llava_video.convert import load_original
from flexselect.llava_video.modeling import (
    LlavaVideoForConditionalGeneration,
    add_newlines,
    frame_grid,
    join_frames,
    pool_patches,
    video_tokens,
)

from .conftest import Golden, prompt, tiny_config, tiny_model


@pytest.fixture(autouse=True)
def no_grad() -> Any:
    with torch.no_grad():
        yield


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


class TestGolden:
    def test_tower(self, golden: Golden) -> None:
        model = load_original(golden.folder / "model").model
        patches = model.encode_pictures(golden.inputs["pixel_values"])
        close(patches, golden.inputs["vision_features"])
        one_by_one = [model.encode_pictures(p[None]) for p in golden.inputs["pixel_values"]]
        close(torch.cat(one_by_one), patches, 1e-5)

    def test_prompt_embeddings(self, golden: Golden) -> None:
        model = load_original(golden.folder / "model").model
        frames = model.frame_features(golden.inputs["vision_features"])
        assert frames.shape[1] == 210 == model.config.frame_grid[0] * model.config.frame_grid[1]
        before, after = golden.around(model.get_input_embeddings())
        close(
            torch.cat((before, frames.flatten(0, 1), after)),
            golden.expected["baseline.inputs_embeds"],
        )

    def test_logits_and_greedy_tokens(self, golden: Golden) -> None:
        model = load_original(golden.folder / "model")
        ids = golden.inputs["input_ids"][0]
        # The tiny vocabulary ends before the real placeholder: use an id the prompt does not.
        unused = min(set(range(320)) - set(ids.tolist()))
        model.config.video_token_index = unused
        pixels = golden.inputs["pixel_values"][None]
        at = golden.placeholder
        video = torch.full((210 * pixels.shape[1],), unused)
        inputs = {
            "input_ids": torch.cat((ids[:at], video, ids[at + 1 :]))[None],
            "pixel_values_videos": pixels,
        }
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        close(model(**inputs).logits[0, -1], golden.expected["baseline.logits"])
        model.generation_config.eos_token_id = None
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        assert out[0, -8:].tolist() == golden.expected["baseline.tokens"].tolist()


class TestPacking:
    def test_bilinear_pooling_samples_between_the_patches(self) -> None:
        """27 to 14 without aligned corners: point i lies at (i + 0.5) · 27/14 - 0.5."""
        row = torch.arange(27.0)
        features = (row[:, None] * 100 + row).flatten()[None, :, None]
        at = ((torch.arange(14) + 0.5) * 27 / 14 - 0.5).clamp(0, 26)
        pooled = pool_patches(features, "bilinear", 2)[0, ..., 0]
        close(pooled, at[:, None] * 100 + at, 1e-3)

    @pytest.mark.parametrize(("mode", "reduce"), [("average", torch.mean), ("max", torch.amax)])
    def test_window_pooling_drops_the_odd_row(self, mode: str, reduce: Any) -> None:
        features = torch.randn(2, 27 * 27, 3)
        grid = features.view(2, 27, 27, 3)[:, :26, :26]
        windows = grid.reshape(2, 13, 2, 13, 2, 3).permute(0, 1, 3, 5, 2, 4).flatten(4)
        close(pool_patches(features, mode, 2), reduce(windows, dim=-1), 1e-6)

    @pytest.mark.parametrize(
        ("position", "newlines"),
        [("grid", [2, 5]), ("frame", [4]), ("one_token", []), ("no_token", [])],
    )
    def test_newlines_stand_where_the_position_says(
        self, position: str, newlines: list[int]
    ) -> None:
        frames = torch.arange(1.0, 9).view(2, 2, 2, 1)
        newline = torch.tensor([-1.0])
        packed = add_newlines(frames, newline, position)
        for number, frame in enumerate(packed[..., 0]):
            assert (frame == -1).nonzero().flatten().tolist() == newlines
            kept = frame[frame != -1].tolist()
            assert kept == frames[number].flatten().tolist()
        joined = join_frames(packed, newline, position)
        tail = [-1.0] if position == "one_token" else []
        assert joined[:, 0].tolist() == packed.flatten().tolist() + tail
        rows, columns = frame_grid(4, "bilinear", 2, position)
        assert rows * columns == packed.shape[1]
        assert video_tokens(2, (rows, columns), position) == len(joined)

    @pytest.mark.parametrize(
        ("mode", "tokens"), [("bilinear", 14 * 15), ("average", 13 * 14), ("max", 13 * 14)]
    )
    def test_tokens_of_the_real_models(self, mode: str, tokens: int) -> None:
        rows, columns = frame_grid(27, mode, 2, "grid")
        assert rows * columns == tokens
        assert pool_patches(torch.zeros(1, 729, 2), mode, 2).shape[1:3] == (rows, columns - 1)

    @pytest.mark.parametrize("mode", ["bilinear", "average", "max"])
    def test_pooling_keeps_the_working_dtype(self, mode: str) -> None:
        assert pool_patches(torch.zeros(1, 25, 2).bfloat16(), mode, 2).dtype == torch.bfloat16


class TestModel:
    def test_one_newline_a_video_is_the_stock_model(self) -> None:
        """With LLaVA-OneVision's packing, every logit is the stock class's."""
        model = tiny_model(newline_position="one_token")
        fields = model.config.to_dict()
        stock_config = LlavaOnevisionConfig.from_dict(fields | {"model_type": "llava_onevision"})
        stock = LlavaOnevisionForConditionalGeneration(stock_config).eval()
        stock.load_state_dict(model.state_dict())
        ids = prompt(model, 3)
        inputs = {"input_ids": ids, "pixel_values_videos": torch.randn(1, 3, 3, 20, 20)}
        close(model(**inputs).logits, stock(**inputs).logits, 1e-5)

    def test_images_take_the_stock_path(self) -> None:
        model = tiny_model()
        stock_config = LlavaOnevisionConfig.from_dict(
            model.config.to_dict() | {"model_type": "llava_onevision"}
        )
        stock = LlavaOnevisionForConditionalGeneration(stock_config).eval()
        stock.load_state_dict(model.state_dict())
        # 40 × 20 pixels: a base picture of 25 patches, then 10 rows of 5 and a newline each.
        image = [model.config.image_token_index] * (25 + 10 * 6)
        inputs = {
            "input_ids": torch.tensor([[5, *image, 6]]),
            "pixel_values": torch.randn(1, 3, 3, 20, 20),
            "image_sizes": torch.tensor([[40, 20]]),
        }
        close(model(**inputs).logits, stock(**inputs).logits, 1e-6)

    def test_an_image_beside_a_video(self) -> None:
        """Both find their placeholders: the logits change with either."""
        model = tiny_model()
        image = [model.config.image_token_index] * (25 + 5 * 6)
        video = prompt(model, 2)[0].tolist()
        inputs = {
            "input_ids": torch.tensor([[5, *image, *video]]),
            "pixel_values": torch.randn(1, 2, 3, 20, 20),
            "image_sizes": torch.tensor([[20, 20]]),
            "pixel_values_videos": torch.randn(1, 2, 3, 20, 20),
        }
        logits = model(**inputs).logits[0, -1]
        for name in ("pixel_values", "pixel_values_videos"):
            other = model(**(inputs | {name: torch.randn_like(inputs[name])})).logits[0, -1]
            assert not torch.allclose(logits, other, atol=1e-3)

    def test_videos_of_different_lengths(self) -> None:
        """Two videos in one prompt, of 1 and 3 frames, each get their own tokens."""
        model = tiny_model()
        videos = [torch.randn(1, 3, 20, 20), torch.randn(3, 3, 20, 20)]
        ids = prompt(model, 1, 3)
        logits = model(input_ids=ids, pixel_values_videos=videos).logits
        embeds = model.get_input_embeddings()(ids)
        features = [
            model.model.frame_features(model.model.encode_pictures(v)).flatten(0, 1) for v in videos
        ]
        embeds[ids == model.config.video_token_index] = torch.cat(features)
        close(logits, model(inputs_embeds=embeds).logits, 1e-5)

    def test_a_long_video_is_encoded_in_chunks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model()
        pixels = torch.randn(1, 7, 3, 20, 20)
        whole = model.get_video_features(pixels).pooler_output
        monkeypatch.setattr("flexselect.llava_video.modeling.PICTURES_PER_CHUNK", 3)
        seen: list[int] = []
        encode = model.model.encode_pictures

        def counted(pictures: Tensor) -> Tensor:
            seen.append(len(pictures))
            return encode(pictures)

        monkeypatch.setattr(model.model, "encode_pictures", counted)
        close(model.get_video_features(pixels).pooler_output, whole, 1e-5)
        assert seen == [3, 3, 1]

    @pytest.mark.parametrize("beams", [1, 2])
    def test_generate_equals_a_loop_over_whole_prompts(self, beams: int) -> None:
        model = tiny_model()
        inputs = {
            "input_ids": prompt(model, 2),
            "pixel_values_videos": torch.randn(1, 2, 3, 20, 20),
        }
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        out = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, num_beams=beams, eos_token_id=None
        )
        if beams == 1:
            ids = inputs["input_ids"]
            for _ in range(5):
                logits = model(
                    input_ids=ids, pixel_values_videos=inputs["pixel_values_videos"]
                ).logits
                ids = torch.cat((ids, logits[:, -1:].argmax(-1)), dim=1)
            assert torch.equal(out, ids)
        else:
            assert out.shape[1] == inputs["input_ids"].shape[1] + 5

    def test_saved_and_loaded_by_the_auto_classes(self, tmp_path: Path) -> None:
        model = tiny_model(spatial_pool_mode="average", newline_position="frame")
        model.save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        assert (config.spatial_pool_mode, config.newline_position) == ("average", "frame")
        loaded, report = AutoModelForImageTextToText.from_pretrained(
            tmp_path, output_loading_info=True
        )
        assert type(loaded) is LlavaVideoForConditionalGeneration
        assert not any(report.values())
        inputs = {
            "input_ids": prompt(model, 2),
            "pixel_values_videos": torch.randn(1, 2, 3, 20, 20),
        }
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)

    def test_what_does_not_fit_is_refused(self) -> None:
        model = tiny_model()
        with pytest.raises(PromptError, match="videos, frames, 3, height, width"):
            model.get_video_features(torch.randn(2, 3, 20, 20))
        with pytest.raises(ValueError, match="do not match"):
            model(input_ids=prompt(model, 2), pixel_values_videos=torch.randn(1, 3, 3, 20, 20))
        features = {"video": model.get_video_features(torch.randn(1, 2, 3, 20, 20))}
        with pytest.raises(PromptError, match="not both"):
            model.model(
                input_ids=prompt(model, 2),
                pixel_values_videos=torch.randn(1, 2, 3, 20, 20),
                mm_encoder_outputs=features,
            )
        for field, value in {
            "spatial_pool_mode": "median",
            "newline_position": "row",
            "spatial_pool_stride": 0,
            "vision_feature_layer": -2,
        }.items():
            with pytest.raises(OptionError, match=field):
                tiny_config(**{field: value})

    def test_encoded_features_replace_pictures(self) -> None:
        model = tiny_model()
        pixels = torch.randn(1, 2, 3, 20, 20)
        ids = prompt(model, 2)
        features = {"video": model.get_video_features(pixels)}
        expected = model(input_ids=ids, pixel_values_videos=pixels).logits
        hidden = model.model(input_ids=ids, mm_encoder_outputs=features).last_hidden_state
        close(model.lm_head(hidden), expected, 1e-6)
        assert list(features) == ["video"]
