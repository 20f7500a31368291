"""Golden data of the family, and a small original checkpoint with a tokenizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..paths import FIXTURES

HERE = Path(__file__).parent
CASES = ("a_single", "b_multi_seed0", "c_budget_ge_total", "e_dynamic_ntk")
TOKENS = ("<|im_end|>", "<|im_start|>", "<img>", "</img>", "<IMG_CONTEXT>")


@pytest.fixture(scope="session")
def fixtures() -> Path:
    if not FIXTURES.is_dir():
        pytest.skip(f"no golden data at {FIXTURES}; set FLEXSELECT_SHARED")
    return FIXTURES


@pytest.fixture(scope="session")
def golden(fixtures: Path) -> Callable[[str], dict[str, torch.Tensor]]:
    """inputs and expected tensors of a case in one dictionary."""

    def load(case: str) -> dict[str, torch.Tensor]:
        folder = fixtures / "internvl2_5" / case
        return {
            **load_file(folder / "inputs.safetensors"),
            **load_file(folder / "expected.safetensors"),
        }

    return load


@pytest.fixture
def sentencepiece_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write tokenizer files as InternLM2 checkpoints have them.

    The chat tokens take the places of pieces from ``chat_at`` on, or are appended.
    """

    def write(name: str = "plain", chat_at: int | None = 7, **config: object) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        shutil.copy(HERE / "data" / f"{name}.model", folder / "tokenizer.model")
        size = json.loads((HERE / "data" / "sentencepiece.json").read_text())[f"{name}_size"]
        ids = {text: size + i for i, text in enumerate(TOKENS[2:])}
        first = size + len(ids) if chat_at is None else chat_at
        ids |= {text: first + i for i, text in enumerate(TOKENS[:2])}
        decoder = {
            str(i): {"content": text, "normalized": False, "special": True}
            for text, i in ids.items()
            if i < size
        }
        settings = {
            "tokenizer_class": "InternLM2Tokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "</s>",
            "unk_token": "<unk>",
            "added_tokens_decoder": decoder,
            **config,
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        extra = {text: i for text, i in ids.items() if i >= size}
        (folder / "added_tokens.json").write_text(json.dumps(extra))
        return folder

    return write


@pytest.fixture
def original(fixtures: Path, sentencepiece_folder: Callable[..., Path]) -> Path:
    """A tiny original checkpoint, whole: weights, config, tokenizer; vocabulary of 643."""
    folder = sentencepiece_folder()
    source = fixtures / "internvl2_5" / "a_single" / "model"
    config = json.loads((source / "config.json").read_text())
    config["llm_config"]["vocab_size"] = 643
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    for name in ("language_model.model.tok_embeddings.weight", "language_model.output.weight"):
        rows = torch.randn(643, 64, generator=torch.Generator().manual_seed(0))
        weights[name] = rows
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
