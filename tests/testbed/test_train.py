"""Training: a miniature learns from scratch, a stopped run goes on as if it never stopped."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from flexselect.core.errors import CheckpointError
from flexselect.testbed import steps as steps_module
from flexselect.testbed import train as train_module
from flexselect.testbed.check import check_clips, family_inputs
from flexselect.testbed.locate import FAMILIES
from flexselect.testbed.models import family_of
from flexselect.testbed.questions import compose
from flexselect.testbed.recipe import (
    Phase,
    Recipe,
    Segment,
    Selecting,
    default_recipe,
    student_recipe,
)
from flexselect.testbed.train import save_checkpoint, train
from flexselect.testbed.videos import draw_plot

MINIATURE = Recipe(
    tower_steps=60,
    tower_scenes=64,
    tower_rate=4e-3,
    pool_scenes=1024,
    phases=(
        Phase(
            "language",
            4e-3,
            10,
            (
                Segment("drill", 100, 24, 52, (2, 4), 8),
                Segment("questions", 160, 24, 66, (2,), 3, tasks=("number",)),
            ),
        ),
    ),
    text={"num_hidden_layers": 3},
)


@torch.no_grad()
def family_logits(family, model):
    """Ask a model one question through the family's processor."""
    pictures = draw_plot(compose(0, 2, ["number"]))
    return model(**family_inputs(family, pictures, "What number is on the red star?")).logits


def shortened(steps, **text):
    return Recipe(
        tower_steps=2,
        tower_scenes=4,
        tower_rate=1e-3,
        pool_scenes=256,
        phases=(
            Phase("language", 1e-3, 2, (Segment("drill", steps, 2, 120, (4,), 4),)),
            Phase(
                "near_misses",
                1e-3,
                2,
                (
                    Segment(
                        "questions", steps, 2, 160, (2,), 2, pruned=0.5, tokens=8, tasks=("count",)
                    ),
                ),
            ),
            Phase(
                "selected",
                1e-3,
                2,
                (
                    Segment(
                        "questions",
                        steps,
                        2,
                        160,
                        (4,),
                        2,
                        tasks=("number",),
                        selecting=Selecting(0.5, (0,), "all", (8, 16), (2, 3), 4),
                    ),
                ),
            ),
        ),
        text={"num_hidden_layers": 1, **text},
    )


def test_a_miniature_learns_to_read_videos_from_scratch(tmp_path):
    torch.set_num_threads(1)
    family = family_of("qwen2_5_vl")
    model, log = train(family, MINIATURE, work=tmp_path)
    assert log[0]["held_out"] > 0.5
    drills, questions = (
        [row for row in log if row["phase"] == "language" and row["step"] in steps]
        for steps in (range(101), range(126, 261))
    )
    for rows in (drills, questions):
        assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
        assert rows[-1]["right"] > rows[0]["right"] + 0.1

    def accuracy(control):
        return check_clips(
            family,
            model.eval(),
            split="validation",
            count=150,
            frames=2,
            tasks=("number",),
            control=control,
        ).accuracy()

    seen, shuffled, blind = accuracy(None), accuracy("shuffled"), accuracy("blind")
    # Chance is 0.1; of 150 questions a guesser gets more than 0.2 right once in ten thousand runs.
    assert seen > 0.2
    assert shuffled < 0.2
    assert blind < 0.2


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stopped_run_goes_on_exactly_as_an_uninterrupted_one(name, tmp_path, monkeypatch):
    family, recipe = family_of(name), shortened(4)
    whole, log = train(family, recipe, work=tmp_path / "whole", save_every=2)
    saved = train_module._State.save
    for stop_after in (1, 1, 2, 2):
        saves = []

        def save(self, *arguments, saves=saves, stop_after=stop_after):
            saved(self, *arguments)
            saves.append(arguments[2:4])
            if len(saves) == stop_after:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(train_module._State, "save", save)
            with pytest.raises(KeyboardInterrupt):
                train(family, recipe, work=tmp_path / "parts", save_every=2)
    parts, log_of_parts = train(family, recipe, work=tmp_path / "parts", save_every=2)
    assert saves == [(2, 0), (2, 2)]
    for (key, one), (_, other) in zip(
        whole.state_dict().items(), parts.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), key
    assert [row["step"] for row in log] == [row["step"] for row in log_of_parts]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_keeps_the_tower_of_its_teacher_and_learns_all_else(name, tmp_path):
    family, recipe = family_of(name), shortened(2, hidden_size=64, num_attention_heads=2)
    torch.manual_seed(1)
    teacher = family.build(num_hidden_layers=1)
    torch.manual_seed(0)
    start = dict(family.build(**recipe.text).named_parameters())
    student, _ = train(family, recipe, work=tmp_path, tower=teacher)
    own = {id(p) for p in family.projector(student).parameters()}
    theirs = dict(teacher.named_parameters())
    tower = {id(p) for part in family.tower(student) for p in part.parameters()} - own
    assert tower
    for key, value in student.named_parameters():
        if id(value) in tower:
            assert torch.equal(value, theirs[key]), key
        else:
            assert not torch.equal(value, start[key]), key
    # Another tower is another run.
    torch.manual_seed(2)
    with pytest.raises(CheckpointError, match="another family, seed or recipe"):
        train(
            family,
            recipe,
            work=tmp_path,
            tower=family.build(num_hidden_layers=1),
        )


def test_the_seed_decides_weights_pool_and_clips(tmp_path, monkeypatch):
    family = family_of("internvl")
    made = []

    def record(module, name, read):
        function = getattr(module, name)

        def recorded(*arguments):
            made.append(read(arguments, result := function(*arguments)))
            return result

        monkeypatch.setattr(module, name, recorded)

    def weights(model):
        return model.model.language_model.layers[0].mlp.up_proj.weight.detach().clone()

    record(train_module, "train_tower", lambda arguments, _: weights(arguments[1]))
    record(train_module, "build_pool", lambda _, pool: torch.from_numpy(pool.marks))
    record(steps_module, "make_batch", lambda _, batch: batch.targets)
    runs = []
    for work, seed in (("first", 0), ("again", 0), ("other", 1)):
        made.clear()
        train(family, shortened(1), work=tmp_path / work, seed=seed)
        runs.append(list(made))
    first, again, other = runs
    assert len(first) == 2 + len(shortened(1).phases)
    assert all(torch.equal(one, two) for one, two in zip(first, again, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("stop", [(1, 0), (2, 0), (3, 0), (3, 2), (4, 0), (5, 0)])
def test_a_phase_is_left_out_where_the_one_before_was_enough(stop, tmp_path, monkeypatch):
    """Also in a run that is stopped just before or after, and not once it has begun."""
    family, recipe = family_of("internvl"), shortened(4)
    first, *_, last = recipe.phases
    enough, more = replace(first, name="enough", unless=0.0), replace(first, name="more", unless=1)
    phases = (first, enough, replace(enough, name="so"), more, replace(last, unless=0.0))
    recipe = replace(recipe, phases=phases)
    saved = train_module._State.save

    def save_and_stop(self, model, optimizer, phase, step, log):
        if (phase, step) == (3, 2):
            # However well "more" goes.
            log = [*log, {"phase": "more", "step": step, "loss": 0.0, "right": 1.0}]
        saved(self, model, optimizer, phase, step, log)
        if (phase, step) == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_module._State, "save", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train(family, recipe, work=tmp_path, save_every=2)
    _, log = train(family, recipe, work=tmp_path, save_every=2)
    ends = {row["phase"]: row["step"] for row in log if row["phase"] != "tower"}
    assert ends == {first.name: 4, "more": 4}
    # All is saved: there is nothing left to train, nor to encode.
    monkeypatch.setattr(train_module, "build_pool", None)
    train(family, recipe, work=tmp_path, save_every=2)


def test_the_state_of_another_run_is_refused(tmp_path):
    family = family_of("internvl")
    train(family, shortened(1), work=tmp_path)
    with pytest.raises(CheckpointError, match="another family, seed or recipe"):
        train(family, shortened(1), work=tmp_path, seed=1)


@pytest.mark.parametrize("content", [b"", b"cut short", None])
def test_a_damaged_state_is_named_and_kept(content, tmp_path):
    family, state = family_of("internvl"), tmp_path / "state.safetensors"
    if content is None:
        save_file({"model.of": torch.zeros(1)}, state)
    else:
        state.write_bytes(content)
    before = state.read_bytes()
    with pytest.raises(CheckpointError, match=r"state\.safetensors (is damaged|belongs to a run)"):
        train(family, shortened(1), work=tmp_path)
    assert state.read_bytes() == before


def test_a_state_that_cannot_be_written_is_an_error_that_keeps_the_one_before(
    tmp_path, monkeypatch
):
    def full(*_, **__):
        raise SafetensorError("no space left on device")

    assert command(monkeypatch, tmp_path, "--least", "0") == 0
    before = (tmp_path / "work" / "state.safetensors").read_bytes()
    monkeypatch.setattr(train_module, "save_file", full)
    model = family_of("internvl").build()
    with pytest.raises(CheckpointError, match="could not be written"):
        train_module._State(tmp_path / "work" / "state.safetensors", "").save(model, None, 0, 0, [])
    assert (tmp_path / "work" / "state.safetensors").read_bytes() == before
    assert not list((tmp_path / "work").glob("*.partial"))


def command(monkeypatch, home, *more):
    """Run the command with a recipe of one step, as if checkpoints lay in ``home``."""
    monkeypatch.setattr(train_module, "default_recipe", lambda family: shortened(1))
    monkeypatch.setattr(train_module, "FOLDER", home / "checkpoints")
    arguments = ["--family", "internvl", "--work", str(home / "work"), "--check", "2"]
    return train_module.main([*arguments, *more])


def test_only_the_first_seed_goes_where_the_projects_own_checkpoints_lie(tmp_path, monkeypatch):
    own = tmp_path / "checkpoints" / "internvl"
    assert command(monkeypatch, tmp_path, "--seed", "1", "--least", "0") == 0
    assert json.loads((tmp_path / "work/checkpoint/training.json").read_text())["seed"] == 1
    assert not own.exists()
    shutil.rmtree(tmp_path / "work")
    own.mkdir(parents=True)
    for name in ("model.safetensors", "of_an_older_one.json"):
        (own / name).touch()
    assert command(monkeypatch, tmp_path, "--least", "0") == 0
    record = json.loads((own / "training.json").read_text())
    assert (record["family"], record["seed"], record["student"]) == ("internvl", 0, False)
    assert not (own / "of_an_older_one.json").exists()
    assert [path.name for path in own.parent.iterdir()] == ["internvl"]
    AutoModelForImageTextToText.from_pretrained(own)


def test_a_checkpoint_that_has_not_learned_is_not_put_in_place(tmp_path, monkeypatch, caplog):
    own = tmp_path / "checkpoints" / "internvl"
    assert command(monkeypatch, tmp_path) == 1
    assert "below --least 0.98" in caplog.text
    assert not own.exists()
    assert (tmp_path / "work" / "checkpoint" / "model.safetensors").is_file()


def test_what_is_no_checkpoint_is_not_replaced(tmp_path, monkeypatch, caplog):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("all of it")
    assert command(monkeypatch, tmp_path, "--least", "0", "--out", str(mine)) == 2
    assert "is no checkpoint" in caplog.text
    assert (mine / "thesis.txt").read_text() == "all of it"
    below = str(mine / "thesis.txt" / "checkpoint")
    assert command(monkeypatch, tmp_path, "--least", "0", "--out", below) == 2
    assert f"{below} cannot be written" in caplog.text
    # It is said before anything is trained.
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--check", "0", "must be at least 1"),
        ("--seed", "-1", "must lie in 0..999999999"),
        ("--seed", "1000000000", "must lie in 0..999999999"),
        ("--least", "nan", "must lie in 0..1"),
        ("--least", "2", "must lie in 0..1"),
    ],
)
def test_options_that_cannot_be_are_refused(option, value, message, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        command(monkeypatch, tmp_path, option, value)
    said = capsys.readouterr().err
    assert option in said
    assert message in said


def test_a_folder_of_work_is_one_runs_own(tmp_path, monkeypatch, caplog):
    (tmp_path / "work").touch()
    assert command(monkeypatch, tmp_path) == 2
    assert "--work" in caplog.text
    (tmp_path / "work").unlink()
    with train_module._alone(tmp_path / "work"):
        assert command(monkeypatch, tmp_path) == 2
    assert "being worked on by another run" in caplog.text
    assert command(monkeypatch, tmp_path, "--least", "0") == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_checkpoint_is_an_ordinary_folder(name, tmp_path):
    family = family_of(name)
    torch.manual_seed(0)
    model = family.build().eval()
    before = family_logits(family, model)
    save_checkpoint(family, model, tmp_path)
    assert torch.equal(family_logits(family, model), before)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 4 * 2**20
    stored = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    loaded, info = AutoModelForImageTextToText.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert type(loaded) is type(model)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert type(processor) is type(family.processor)
    family.processor = processor
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    torch.testing.assert_close(
        family_logits(family, loaded), family_logits(family, model), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_no_whole_clip_of_the_recipe_is_longer_than_sixteen_pictures(name):
    family = family_of(name)
    slots = len(family.frame_slots()[0])
    for phase in (*default_recipe(family).phases, *student_recipe(family).phases):
        for segment in phase.segments:
            assert max(segment.pictures) <= 16
            frames = 16 // family.pictures_per_frame
            around = sum(len(part) for part in family.around())
            assert segment.length > around + frames * slots + 16
            if segment.selecting is not None:
                # A sixteenth of 1,024 frames, with everything that stays beside a kept token.
                ranked = family.frame_slots()[1]
                most = max(segment.selecting.budgets)
                assert most >= 1024 * sum(ranked) // family.pictures_per_frame // 16
                assert segment.length > around + most * (1 + ranked.count(False)) + 16
