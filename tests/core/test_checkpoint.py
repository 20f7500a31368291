"""Checkpoints are read shard by shard, matched whole, and written whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flexselect.core.checkpoint import (
    Checkpoint,
    load_into,
    plan_conversion,
    read_json,
    rename_prefix,
    shapes,
)
from flexselect.core.checkpoint_writer import write_converted
from flexselect.core.errors import CheckpointError
from tests.paths import ROOT


def keep(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    return [(name, tensor)]


def to_model(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Split the fused matrix of the stored model and rename the rest."""
    if name == "fused.weight":
        query, key = tensor.split([4, 2])
        return [("layer.query.weight", query), ("layer.key.weight", key)]
    return [(rename_prefix(name, {"emb.": "embed.", "head.": "lm_head."}), tensor)]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.permute(tuple(reversed(range(tensor.ndim))))


class Tiny(nn.Module):
    """A model with a tied head, a stored buffer and one that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.layer = nn.ModuleDict(
            {"query": nn.Linear(3, 4, bias=False), "key": nn.Linear(3, 2, bias=False)}
        )
        self.lm_head = nn.Linear(3, 5, bias=False)
        self.register_buffer("steps", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("table", torch.arange(3.0), persistent=False)


def empty(buffers: bool = True) -> Tiny:
    """Build `Tiny` with its parameters, and where asked its buffers, on the meta device."""
    model = Tiny()
    for module in model.modules():
        for name, value in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(value.to("meta")))
    if not buffers:
        model.table = model.table.to("meta")
    return model


STORED = {
    "emb.weight": torch.arange(15.0).view(5, 3),
    "fused.weight": torch.arange(18.0).view(6, 3) / 7,
    "steps": torch.tensor([3, 2**40]),
}
TIED = {"lm_head.weight": "embed.weight"}


def write_shards(folder: Path, *shards: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / name)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    first = {name: STORED[name] for name in ("emb.weight", "steps")}
    return write_shards(tmp_path / "source", first, {"fused.weight": STORED["fused.weight"]})


class TestReading:
    def test_lists_shapes_and_dtypes_without_values(self, source: Path) -> None:
        blank = Checkpoint(source).blank
        assert {name: (t.shape, t.dtype, t.is_meta) for name, t in blank.items()} == {
            name: (t.shape, t.dtype, True) for name, t in STORED.items()
        }

    def test_streams_what_is_asked_for_and_nothing_else(self, source: Path) -> None:
        checkpoint = Checkpoint(source)
        read = dict(checkpoint.stream({"steps", "fused.weight"}))
        assert list(read) == ["steps", "fused.weight"]
        assert all(torch.equal(read[name], STORED[name]) for name in read)
        assert torch.equal(checkpoint.read("emb.weight"), STORED["emb.weight"])

    def test_maps_one_shard_at_a_time(self, source: Path) -> None:
        """A shard is opened only when its first tensor is wanted: the second may vanish first."""
        stream = Checkpoint(source).stream(STORED)
        assert next(stream)[0] in STORED
        (source / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(CheckpointError, match="00002-of-00002"):
            list(stream)

    def test_a_single_file_and_its_folder_are_the_same(self, tmp_path: Path) -> None:
        save_file(STORED, tmp_path / "model.safetensors")
        for path in (tmp_path, tmp_path / "model.safetensors"):
            assert set(Checkpoint(path).blank) == set(STORED)

    def test_names_what_is_wrong(self, tmp_path: Path, source: Path) -> None:
        second = source / "model-00002-of-00002.safetensors"
        whole = second.read_bytes()
        cases: dict[str, Callable[[], object] | None] = {
            "does not exist": None,
            "lacks 1 of its 2 shards: model-00002": second.unlink,
            "00002.*damaged or incomplete": lambda: second.write_bytes(whole[:-1]),
            "00002.* is damaged": lambda: second.write_bytes(b"no safetensors"),
            "disagrees with its shards about fused": lambda: save_file(
                {"other": torch.zeros(1)}, second
            ),
            "emb.weight is stored twice": lambda: save_file({"emb.weight": torch.zeros(1)}, second),
        }
        for message, spoil in cases.items():
            path = tmp_path / "nowhere" if spoil is None else source
            if spoil is not None:
                spoil()
            with pytest.raises(CheckpointError, match=message):
                Checkpoint(path)
            second.write_bytes(whole)
        assert set(Checkpoint(source).blank) == set(STORED)

    def test_an_index_must_be_sound(self, source: Path) -> None:
        index = source / "model.safetensors.index.json"
        for content, message in (("{", "read as JSON"), ("[]", "object"), ("{}", "no shards")):
            index.write_text(content)
            with pytest.raises(CheckpointError, match=message):
                Checkpoint(source)
        index.unlink()
        with pytest.raises(CheckpointError, match=r"2 \.safetensors files and 0 indices"):
            Checkpoint(source)

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
    def test_pickles_are_never_read(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"\x80\x02.")
        with pytest.raises(CheckpointError, match=r"only \.safetensors"):
            Checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match=r"not a \.safetensors file"):
            Checkpoint(tmp_path / name)

    def test_an_empty_folder_says_so(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"holds no \.safetensors"):
            Checkpoint(tmp_path)

    def test_json_errors_name_the_file(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
            read_json(tmp_path / "config.json")
        (tmp_path / "config.json").write_bytes(b"\xff\xfe")
        with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
            read_json(tmp_path / "config.json")


class TestPlan:
    expected: ClassVar = {"a": (2, 3), "b": (4,)}

    def stored(self, **sizes: tuple[int, ...]) -> dict[str, Tensor]:
        return {name: torch.empty(size, device="meta") for name, size in sizes.items()}

    def test_a_match_is_a_plan(self) -> None:
        plan = plan_conversion(self.stored(a=(2, 3), b=(4,)), self.expected, keep)
        assert plan.routes == {"a": {"a"}, "b": {"b"}}

    def test_everything_wrong_is_listed_at_once(self) -> None:
        with pytest.raises(CheckpointError) as caught:
            plan_conversion(self.stored(a=(3, 2), c=(1,)), self.expected, keep)
        message = str(caught.value)
        assert "1 parameters of the model are not in the checkpoint: b" in message
        assert "1 tensors of the checkpoint have no place in the model: c" in message
        assert "a (3, 2), where a is (2, 3)" in message

    def test_ignored_names_are_exact(self) -> None:
        stored = self.stored(a=(2, 3), b=(4,), extra=(1,), extra2=(1,))
        with pytest.raises(CheckpointError, match="no place in the model: extra2"):
            plan_conversion(stored, self.expected, keep, ignored=["extra", "never there"])

    def test_a_conversion_may_not_lose_a_tensor(self) -> None:
        stored = self.stored(a=(2, 3), b=(4,), c=(1,))
        with pytest.raises(CheckpointError, match="no place in the model: c"):
            plan_conversion(stored, self.expected, lambda n, t: [] if n == "c" else [(n, t)])

    def test_two_tensors_may_not_fill_one_parameter(self) -> None:
        stored = self.stored(a=(2, 3), b=(4,), c=(4,))
        with pytest.raises(CheckpointError, match=r"filled twice: b \(from b and c\)"):
            plan_conversion(stored, self.expected, lambda n, t: [("b" if n == "c" else n, t)])

    def test_a_long_list_is_cut(self) -> None:
        with pytest.raises(CheckpointError, match="p9 and 15 more"):
            plan_conversion({}, {f"p{i}": (1,) for i in range(25)}, keep)


class TestLoading:
    def test_fills_splits_renames_and_ties(self, source: Path) -> None:
        model = empty()
        load_into(model, Checkpoint(source), to_model, tied=TIED)
        state = model.state_dict()
        assert torch.equal(state["embed.weight"], STORED["emb.weight"])
        assert torch.equal(state["layer.query.weight"], STORED["fused.weight"][:4])
        assert torch.equal(state["layer.key.weight"], STORED["fused.weight"][4:])
        assert torch.equal(state["steps"], STORED["steps"])
        assert model.lm_head.weight is model.embed.weight
        model.requires_grad_(True)
        model.lm_head(model.embed(torch.tensor([1]))).sum().backward()

    def test_casts_floats_only(self, source: Path) -> None:
        model = empty()
        load_into(model, Checkpoint(source), to_model, tied=TIED, dtype=torch.bfloat16)
        assert model.embed.weight.dtype == torch.bfloat16
        assert torch.equal(model.embed.weight, STORED["emb.weight"].bfloat16())
        assert torch.equal(model.state_dict()["steps"], STORED["steps"])

    def test_asks_where_each_parameter_goes(self, source: Path) -> None:
        asked: list[str] = []
        model = empty()
        load_into(
            model,
            Checkpoint(source),
            to_model,
            tied=TIED,
            device=lambda name: asked.append(name) or "cpu",  # type: ignore[func-returns-value]
        )
        assert sorted(asked) == sorted(name for name in shapes(model) if name not in TIED)

    def test_a_mismatch_leaves_the_model_untouched(self, source: Path) -> None:
        model = empty()
        with pytest.raises(CheckpointError, match=r"not in the checkpoint: lm_head\.weight"):
            load_into(model, Checkpoint(source), to_model)
        assert all(parameter.is_meta for parameter in model.parameters())

    @pytest.mark.parametrize("head_first", [True, False])
    def test_both_copies_of_a_tied_weight_must_agree(
        self, tmp_path: Path, head_first: bool
    ) -> None:
        head = {"head.weight": STORED["emb.weight"].clone()}
        shards = [head, STORED] if head_first else [STORED, head]
        model = empty()
        load_into(model, Checkpoint(write_shards(tmp_path, *shards)), to_model, tied=TIED)
        assert torch.equal(model.lm_head.weight, STORED["emb.weight"])
        head["head.weight"][0, 0] += 1
        with pytest.raises(CheckpointError, match="tie_word_embeddings"):
            load_into(empty(), Checkpoint(write_shards(tmp_path, *shards)), to_model, tied=TIED)

    def test_an_untied_head_keeps_its_own_weight(self, tmp_path: Path) -> None:
        head = {"head.weight": -STORED["emb.weight"]}
        model = empty()
        load_into(model, Checkpoint(write_shards(tmp_path, STORED, head)), to_model)
        assert torch.equal(model.lm_head.weight, -model.embed.weight)

    def test_a_buffer_without_values_is_an_error(self, source: Path) -> None:
        with pytest.raises(CheckpointError, match="table have no values"):
            load_into(empty(buffers=False), Checkpoint(source), to_model, tied=TIED)


class TestWriting:
    def test_writes_what_loading_would_give(self, source: Path, tmp_path: Path) -> None:
        seen: list[tuple[int, int]] = []
        target = write_converted(
            empty(),
            Checkpoint(source),
            tmp_path / "deep" / "target",
            to_model,
            tied=TIED,
            progress=lambda done, total: seen.append((done, total)),
        )
        written = load_file(target / "model.safetensors")
        model = empty()
        load_into(model, Checkpoint(source), to_model, tied=TIED)
        state = {k: v for k, v in model.state_dict().items() if k not in TIED}
        assert written.keys() == state.keys()
        assert all(torch.equal(written[name], state[name]) for name in state)
        total = sum(value.nbytes for value in state.values())
        assert [done for done, _ in seen] == sorted(done for done, _ in seen)
        assert seen[-1] == (total, total)
        assert os.listdir(target.parent) == ["target"]

    def test_shards_and_their_index_read_back(self, source: Path, tmp_path: Path) -> None:
        target = write_converted(
            empty(), Checkpoint(source), tmp_path / "t", to_model, tied=TIED, shard_bytes=80
        )
        index = read_json(target / "model.safetensors.index.json")
        files = sorted(set(index["weight_map"].values()))
        assert files == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        for file in files:
            assert sum(value.nbytes for value in load_file(target / file).values()) <= 80
        again = dict(Checkpoint(target).stream(index["weight_map"]))
        assert again.keys() == shapes(empty()).keys() - TIED.keys()
        assert index["metadata"]["total_size"] == sum(value.nbytes for value in again.values())

    @settings(max_examples=40, deadline=None)
    @given(
        sizes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
        dtypes=st.lists(
            st.sampled_from(
                [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
            ),
            min_size=6,
            max_size=6,
        ),
        shard_bytes=st.sampled_from([1, 50, 10**6]),
    )
    def test_any_tensors_survive(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        sizes: list[list[int]],
        dtypes: list[torch.dtype],
        shard_bytes: int,
    ) -> None:
        """Scalars, empty tensors, mixed dtypes and views read back, and stay aligned."""
        folder = tmp_path_factory.mktemp("any")
        model = nn.Module()
        values = {}
        for i, (size, dtype) in enumerate(zip(sizes, dtypes, strict=False)):
            values[f"t{i}"] = torch.randint(0, 2, size).to(dtype)
            model.register_buffer(f"t{i}", torch.empty(size[::-1], dtype=dtype, device="meta"))
        save_file(values, folder / "model.safetensors")
        target = write_converted(
            model,
            Checkpoint(folder),
            folder / "out",
            lambda name, tensor: [(name, transposed(tensor))],
            shard_bytes=shard_bytes,
        )
        read = dict(Checkpoint(target).stream(values))
        for name, value in values.items():
            assert read[name].dtype == value.dtype
            assert torch.equal(read[name], transposed(value))
            assert read[name].data_ptr() % read[name].itemsize == 0

    def test_a_cast_in_pieces_is_a_cast(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("flexselect.core.checkpoint_writer._CHUNK_BYTES", 100)
        value = torch.randn(57, 13)
        save_file({"w": value}, tmp_path / "model.safetensors")
        model = nn.Module()
        model.w = nn.Parameter(torch.empty(57, 13, device="meta"))
        target = write_converted(
            model, Checkpoint(tmp_path), tmp_path / "t", keep, dtype=torch.float16
        )
        assert torch.equal(load_file(target / "model.safetensors")["w"], value.half())

    def test_refuses_what_it_must_not_touch(self, source: Path, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.mkdir()
        (target / "thesis.tex").write_text("years of work")

        def write(path: Path, overwrite: bool = False) -> None:
            write_converted(
                empty(), Checkpoint(source), path, to_model, tied=TIED, overwrite=overwrite
            )

        with pytest.raises(CheckpointError, match="exists"):
            write(target)
        with pytest.raises(CheckpointError, match="not overwritten"):
            write(target, overwrite=True)
        for path in (source, source.parent):
            with pytest.raises(CheckpointError, match="being read"):
                write(path, overwrite=True)
        assert (target / "thesis.tex").read_text() == "years of work"
        (target / "config.json").write_text("{}")
        write(target, overwrite=True)
        assert os.listdir(target) == ["model.safetensors"]
        assert sorted(os.listdir(tmp_path)) == ["source", "target"]

    def test_a_failure_leaves_the_old_checkpoint(self, source: Path, tmp_path: Path) -> None:
        target = tmp_path / "target"
        target.mkdir()
        (target / "config.json").write_text("old")

        def fail(_: Path) -> None:
            raise OSError("disk on fire")

        with pytest.raises(OSError, match="disk on fire"):
            write_converted(
                empty(),
                Checkpoint(source),
                target,
                to_model,
                tied=TIED,
                overwrite=True,
                finish=fail,
            )
        assert (target / "config.json").read_text() == "old"
        assert sorted(os.listdir(tmp_path)) == ["source", "target"]

    def test_a_full_disk_is_noticed_first(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=9))
        with pytest.raises(CheckpointError, match="Free some space"):
            write_converted(empty(), Checkpoint(source), tmp_path / "t", to_model, tied=TIED)
        assert os.listdir(tmp_path) == ["source"]


# -- real processes ----------------------------------------------------------------------------

_SHARDS, _PER_SHARD, _ROWS = 6, 4, 2**10  # 16 MiB a tensor in float32
_MIB = 2**20

_PROCESS = """
import sys
from pathlib import Path

import torch
from torch import nn

torch.set_num_threads(1)
# The core alone: without what the package itself imports, which takes seconds and memory.
sys.modules["flexselect"] = package = type(sys)("flexselect")
package.__path__ = [sys.argv[5]]
from flexselect.core.checkpoint import Checkpoint, load_into
from flexselect.core.checkpoint_writer import write_converted

source, target, mode, stop = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
checkpoint = Checkpoint(source)
model = nn.Module()
for name, value in checkpoint.blank.items():
    model.register_parameter(name, nn.Parameter(value))


def resident(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) // 1024


def wait():
    print("waiting", flush=True)
    sys.stdin.read()


def progress(done, total):
    if stop and done >= stop:
        wait()


def finish(folder):
    if mode == "finish":
        wait()
    (folder / "config.json").write_text("{}")


keep = lambda name, tensor: [(name, tensor)]
Path("/proc/self/clear_refs").write_text("5")  # restarts the peak below
before = resident("VmRSS")
if mode == "load":
    load_into(model, checkpoint, keep, dtype=torch.bfloat16)
else:
    write_converted(
        model, checkpoint, target, keep, dtype=torch.bfloat16, shard_bytes=48 * 2**20,
        finish=finish, progress=progress,
    )
print(resident("VmHWM") - before, flush=True)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of 384 MiB in shards of 64 MiB."""
    value = torch.arange(_ROWS * 4096, dtype=torch.float32).view(_ROWS, 4096)
    folder = tmp_path_factory.mktemp("large")
    yield write_shards(
        folder / "source",
        *({f"t{shard}_{i}": value + shard for i in range(_PER_SHARD)} for shard in range(_SHARDS)),
    )
    for file in (folder / "source").glob("*.safetensors"):
        file.unlink()


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _PROCESS, *map(str, arguments), ROOT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc"
)


@linux
@pytest.mark.parametrize(("mode", "kept"), [("write", 0), ("load", 192)])
def test_memory_stays_at_one_shard(large: Path, tmp_path: Path, mode: str, kept: int) -> None:
    """Peak memory: the loaded weights, the largest shard, and a quarter of the whole.

    The peak counts mapped pages of the shards too, which the kernel drops when it pleases.
    """
    process = start(large, tmp_path / "target", mode, 0)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert int(output) < kept + 64 + 96


@linux
@pytest.mark.parametrize(("mode", "stop"), [("write", 100 * _MIB), ("finish", 0)])
def test_a_killed_conversion_looks_unfinished(
    large: Path, tmp_path: Path, mode: str, stop: int
) -> None:
    target = tmp_path / "target"
    process = start(large, target, mode, stop)
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL
    process.communicate()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".target.incomplete-")
    assert not (left / "config.json").exists()
    if mode == "write":
        with pytest.raises(CheckpointError):
            Checkpoint(left)


def test_a_conversion_after_a_killed_one_works(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    leftover = tmp_path / ".target.incomplete-0"
    leftover.mkdir()
    target = write_converted(empty(), Checkpoint(source), tmp_path / "target", to_model, tied=TIED)
    assert str(leftover) in caplog.text
    assert leftover.is_dir()
    assert set(Checkpoint(target).blank) == shapes(empty()).keys() - TIED.keys()
