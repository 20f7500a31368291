"""Imports point down: face → evaluation, training, visualization → inference → families → core."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

from flexselect.tests.paths import ROOT

#: Folder of the house: its floor. A module imports from its own folder and from lower floors.
FLOORS = {
    "core": 0,
    "internvl": 1,
    "llava_video": 1,
    "qwen2_5_vl": 1,
    "qwen3_vl": 1,
    "inference": 2,
    "testbed": 3,
    "evaluation": 4,
    "training": 4,
    "visualization": 4,
}
FACE = 5

#: Third parties of the model-agnostic core. huggingface_hub only fetches a checkpoint by its id,
#: and accelerate only spreads a model over devices.
CORE_THIRD_PARTIES = {"torch", "safetensors", "huggingface_hub", "accelerate"}


def modules() -> list[Path]:
    """Return every module of the library, relative to the root."""
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*.py")]
    outside = {"tests", "scripts", "build", "dist"}
    return sorted(
        path
        for path in found
        if path.parts[0] not in outside and not any(p.startswith(".") for p in path.parts)
    )


def imports(module: Path) -> set[tuple[str, ...]]:
    """Return what a module imports, as dotted names split at the dots, starting at the top."""
    found: set[tuple[str, ...]] = set()
    package = ("flexselect", *module.parts[:-1])
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            # `from .. import core` names a folder only in what is imported.
            found |= {(*base, alias.name) for alias in node.names}
    return found


def floor(module: Path) -> int:
    return FACE if len(module.parts) == 1 else FLOORS[module.parts[0]]


def test_every_folder_has_a_floor() -> None:
    folders = {path.parts[0] for path in modules() if len(path.parts) > 1}
    assert folders <= set(FLOORS), "say in FLOORS what the new folder may import"


def test_imports_point_down() -> None:
    wrong = [
        f"{module} imports {'.'.join(name)}"
        for module in modules()
        for name in imports(module)
        if name[0] == "flexselect"
        and len(module.parts) > 1
        and name[1] != module.parts[0]
        and FLOORS.get(name[1], FACE) >= floor(module)
    ]
    assert not wrong


def test_modules_import_each_other_relatively() -> None:
    # An absolute import would still reach the original when its folder is copied to a new name.
    absolute = re.compile(r"^\s*(from|import) flexselect\b", re.MULTILINE)
    wrong = [str(module) for module in modules() if absolute.search((ROOT / module).read_text())]
    assert not wrong


def test_core_knows_no_model() -> None:
    third_parties = {
        name[0]
        for module in modules()
        if module.parts[0] == "core"
        for name in imports(module)
        if name[0] not in sys.stdlib_module_names and name[0] != "flexselect"
    }
    assert third_parties <= CORE_THIRD_PARTIES


def test_private_names_stay_in_their_folder() -> None:
    wrong = [
        f"{module} reads {'.'.join(name)}"
        for module in modules()
        for name in imports(module)
        if name[0] == "flexselect" and len(module.parts) > 1 and name[1] != module.parts[0]
        if any(part.startswith("_") and not part.startswith("__") for part in name)
    ]
    assert not wrong


def test_nothing_unpickles_or_runs_a_checkpoints_code() -> None:
    wrong = []
    for module in modules():
        names = {name[0] for name in imports(module)}
        wrong += [f"{module}: {n}" for n in names & {"pickle", "cloudpickle", "dill", "joblib"}]
        for node in ast.walk(ast.parse((ROOT / module).read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load":
                wrong.append(f"{module}:{node.lineno}: torch.load")
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                wrong += [] if ast.unparse(node.value) == "False" else [f"{module}: remote code"]
    assert not wrong
