"""Safetensors checkpoints, read shard by shard and renamed on the way into a model.

A family describes its conversion as one pure function from a stored tensor to the tensors of the
model. Before a byte of weights is read, every stored name is matched with every parameter by shape
alone (`plan_conversion`); then the tensors are streamed (`stream_converted`) into a model built on
the meta device (`load_into`) or into a new checkpoint (`core.checkpoint_writer`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import CheckpointError

#: Turns one stored tensor into the tensors of the model it becomes. Also called with tensors on the
#: meta device, so it must not look at values.
Convert = Callable[[str, Tensor], Iterable[tuple[str, Tensor]]]

#: How the file ends that tells which shard holds which tensor.
INDEX_SUFFIX = ".safetensors.index.json"

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LISTED = 10

#: Names of the dtypes in a safetensors header.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Checkpoint:
    """The tensors of a safetensors checkpoint, listed from the file headers.

    Parameters
    ----------
    path : a ``.safetensors`` file, or a directory with one such file or with shards and their
        ``*.safetensors.index.json``.

    Attributes
    ----------
    blank : name to a tensor of the stored shape and dtype on the meta device, shard after shard.

    Raises
    ------
    CheckpointError
        Nothing there, only pickled weights, a shard missing or damaged, or an index that disagrees
        with its shards.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.blank: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        files, weight_map = _locate(self.path)
        for file in files:
            for name, tensor in _read_header(file).items():
                if name in self._files:
                    raise CheckpointError(
                        f"{name} is stored twice, in {self._files[name]} and in {file}."
                    )
                self.blank[name] = tensor
                self._files[name] = file
        if weight_map is not None:
            stored = {name: file.name for name, file in self._files.items()}
            wrong = sorted(name for name, _ in stored.items() ^ weight_map.items())
            if wrong:
                raise CheckpointError(
                    f"The index of {self.path} disagrees with its shards about {some(wrong)}. "
                    "Files of two checkpoints may be mixed; download it again."
                )

    def stream(self, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors ``names``, shard by shard, in the order of their bytes.

        A tensor maps the file and costs no memory before its values are read; let go of it before
        taking the next, and only one shard is ever mapped.
        """
        for file in dict.fromkeys(self._files.values()):
            wanted = [name for name, at in self._files.items() if at == file and name in names]
            if not wanted:
                continue
            with _open(file) as handle:
                for name in wanted:
                    yield name, handle.get_tensor(name)

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        return next(tensor for _, tensor in self.stream([name]))


@dataclass(frozen=True)
class Plan:
    """How a checkpoint becomes a model, decided before any weight is read.

    Attributes
    ----------
    routes : stored name to the parameters it fills.
    blank : parameter to a tensor of its shape and dtype on the meta device, in reading order.
    duplicates : (stored name, stored name, parameter): two copies of one tied parameter, of which
        the first is used and the second must equal it.
    convert, tied : as given to `plan_conversion`.
    """

    routes: dict[str, frozenset[str]]
    blank: dict[str, Tensor]
    duplicates: tuple[tuple[str, str, str], ...]
    convert: Convert
    tied: Mapping[str, str]


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object, such as a ``config.json``.

    Raises `CheckpointError` where the file is missing or holds no JSON object.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist. Name the folder of a checkpoint.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(content).__name__}.")
    return content


def some(names: Sequence[str]) -> str:
    """List names for a message, at most a few of them."""
    listed = ", ".join(names[:_LISTED])
    return listed if len(names) <= _LISTED else f"{listed} and {len(names) - _LISTED} more"


def rename_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """Replace the first prefix of ``name`` that ``prefixes`` lists; leave other names alone.

    A name no rule knows keeps its name, and so is reported as unexpected by `plan_conversion`.
    """
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def plan_conversion(
    stored: Mapping[str, Tensor],
    expected: Mapping[str, Sequence[int]],
    convert: Convert,
    *,
    ignored: Collection[str] = (),
    tied: Mapping[str, str] | None = None,
) -> Plan:
    """Match every stored tensor with every parameter, by name and shape.

    Parameters
    ----------
    stored : stored name to a tensor on the meta device; see `Checkpoint.blank`.
    expected : parameter to shape, aliases included; see `shapes`.
    convert : the family's conversion.
    ignored : stored names, spelled out, that the model has no use for. They may be absent.
    tied : alias to the parameter it shares its weight with.

    Raises
    ------
    CheckpointError
        Lists every stored tensor without a parameter, parameter without a stored tensor, parameter
        filled twice, and wrong shape.
    """
    tied = tied or {}
    shapes_of = {name: tuple(shape) for name, shape in expected.items() if name not in tied}
    sources: dict[str, tuple[str, bool]] = {}
    blank: dict[str, Tensor] = {}
    duplicates: list[tuple[str, str, str]] = []
    routes: dict[str, set[str]] = {}
    unexpected: list[str] = []
    twice: list[str] = []
    misshapen: list[str] = []
    for source, tensor in stored.items():
        if source in ignored:
            continue
        routes[source] = set()
        converted = [(name, value) for name, value in convert(source, tensor)]
        if not converted:
            unexpected.append(source)
        for target, value in converted:
            name = tied.get(target, target)
            if name not in shapes_of:
                unexpected.append(source if source == target else f"{source} (as {target})")
                continue
            if tuple(value.shape) != shapes_of[name]:
                misshapen.append(
                    f"{source} {tuple(value.shape)}, where {name} is {shapes_of[name]}"
                )
            if name not in sources:
                sources[name] = source, target != name
                routes[source].add(name)
                blank[name] = value
                continue
            first, first_is_alias = sources[name]
            if first_is_alias == (target != name):
                twice.append(f"{name} (from {first} and {source})")
                continue
            duplicates.append((first, source, name))
    missing = [name for name in shapes_of if name not in sources]
    problems = [
        f"{len(names)} {what}: {some(names)}"
        for names, what in (
            (missing, "parameters of the model are not in the checkpoint"),
            (unexpected, "tensors of the checkpoint have no place in the model"),
            (misshapen, "tensors have the wrong shape"),
            (twice, "parameters would be filled twice"),
        )
        if names
    ]
    if problems:
        raise CheckpointError("The checkpoint does not fit the model. " + ". ".join(problems) + ".")
    used = {source: frozenset(names) for source, names in routes.items() if names}
    return Plan(used, blank, tuple(duplicates), convert, tied)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of every stored parameter and buffer of ``model``."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def stream_converted(plan: Plan, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of ``plan`` once, in the order of ``plan.blank``.

    Raises `CheckpointError` at the start where a tied weight is stored in two versions.
    """
    _check_duplicates(plan, checkpoint)
    for source, tensor in checkpoint.stream(plan.routes):
        for target, value in plan.convert(source, tensor):
            name = plan.tied.get(target, target)
            if name in plan.routes[source]:
                yield name, value


def load_into(
    model: nn.Module,
    checkpoint: Checkpoint,
    convert: Convert,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | Callable[[str], torch.device | str] = "cpu",
    ignored: Collection[str] = (),
    tied: Mapping[str, str] | None = None,
) -> None:
    """Fill a model whose parameters are on the meta device, one tensor at a time.

    Parameters
    ----------
    model : its parameters are replaced in place; its buffers that are not stored must be real.
    dtype : dtype of the floating-point parameters; default, as stored. On the CPU, parameters that
        keep their dtype map the file instead of being copied.
    device : where parameters go, or a function from parameter name to that; what goes to the meta
        device must be stored all the same.
    convert, ignored, tied : as in `plan_conversion`.

    Raises
    ------
    CheckpointError
        As `plan_conversion`, before any weight is read; or a tied weight is stored in two versions.
    """
    plan = plan_conversion(checkpoint.blank, shapes(model), convert, ignored=ignored, tied=tied)
    place = device if callable(device) else lambda _: device
    for name, value in stream_converted(plan, checkpoint):
        target = dtype if dtype is not None and value.is_floating_point() else value.dtype
        _assign(model, name, value.to(place(name), target).contiguous())
    for alias, name in plan.tied.items():
        owner, leaf = _owner(model, alias)
        setattr(owner, leaf, model.get_parameter(name))
    tensors = [*model.named_parameters(), *model.named_buffers()]
    left = [
        name
        for name, tensor in tensors
        if tensor.is_meta and torch.device(place(name)).type != "meta"
    ]
    if left:
        raise CheckpointError(
            f"{some(left)} have no values after loading: no checkpoint stores them. Build the "
            "model with its buffers outside the meta device."
        )


# -- reading -----------------------------------------------------------------------------------


def _locate(path: Path) -> tuple[list[Path], dict[str, str] | None]:
    """Return the safetensors files of a checkpoint and, for shards, the index's weight map."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise CheckpointError(f"{path} is not a .safetensors file; only those are read.")
        return [path], None
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist. Name a checkpoint folder.")
    indices = sorted(path.glob(f"*{INDEX_SUFFIX}"))
    if len(indices) == 1:
        weight_map = read_json(indices[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{indices[0]} lists no shards (weight_map).")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not (path / name).is_file()]
        if missing:
            raise CheckpointError(
                f"{path} lacks {len(missing)} of its {len(names)} shards: {some(missing)}. "
                "Download them again."
            )
        return [path / name for name in names], weight_map
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files, None
    if files:
        raise CheckpointError(
            f"{path} holds {len(files)} .safetensors files and {len(indices)} indices that tell "
            f"how they belong together; expected one model{INDEX_SUFFIX}."
        )
    if any(file for pattern in _PICKLES for file in path.glob(pattern)):
        raise CheckpointError(
            f"{path} holds pickled weights only. Pickle can run code, so only .safetensors files "
            "are read; save the model with safe_serialization first."
        )
    raise CheckpointError(f"{path} holds no .safetensors file.")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file} is damaged or incomplete ({error}). Download it again."
        ) from error


def _read_header(file: Path) -> dict[str, Tensor]:
    blank = {}
    with _open(file) as handle:
        for name in handle.offset_keys():
            entry = handle.get_slice(name)
            dtype = DTYPES.get(entry.get_dtype())
            if dtype is None:
                raise CheckpointError(
                    f"{name} in {file} has dtype {entry.get_dtype()}; expected one of "
                    f"{', '.join(DTYPES)}."
                )
            blank[name] = torch.empty(entry.get_shape(), dtype=dtype, device="meta")
    return blank


# -- loading -----------------------------------------------------------------------------------


def _check_duplicates(plan: Plan, checkpoint: Checkpoint) -> None:
    for first, second, name in plan.duplicates:
        copies = [
            value
            for source in (first, second)
            for target, value in plan.convert(source, checkpoint.read(source))
            if plan.tied.get(target, target) == name
        ]
        if not torch.equal(copies[0], copies[1]):
            raise CheckpointError(
                f"{first} and {second} differ, but the configuration says that they share one "
                "weight. If the model was trained with two, set tie_word_embeddings to false in "
                f"the config.json of {checkpoint.path}."
            )


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    prefix, _, leaf = name.rpartition(".")
    return model.get_submodule(prefix), leaf


def _assign(model: nn.Module, name: str, value: Tensor) -> None:
    owner, leaf = _owner(model, name)
    old = getattr(owner, leaf)
    if isinstance(old, nn.Parameter):
        value = nn.Parameter(value, requires_grad=old.requires_grad)
    setattr(owner, leaf, value)
