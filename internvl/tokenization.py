"""The tokenizer of an original checkpoint, without its remote code.

InternLM2 checkpoints ship a sentencepiece BPE model and Python code that reads it. Everything that
code relies on is in the file itself, so it is read here and handed to a stock fast tokenizer. The
Qwen2 and Llama checkpoints of the same family hold files that stock classes read.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen2Tokenizer

from ..core.checkpoint import read_json
from ..core.errors import CheckpointError

logger = logging.getLogger(__name__)

#: The names under which the stock processor looks for the tokens around and of a picture.
IMAGE_TOKENS = {
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "video_token": "<video>",
}

# Generation continues a prompt at its right end, so padding goes to the left.
_SETTINGS: dict[str, Any] = {"padding_side": "left", "extra_special_tokens": IMAGE_TOKENS}

_NORMAL, _USER_DEFINED = 1, 4  # piece types of sentencepiece
_BPE = 2  # model type of sentencepiece


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of an original InternVL checkpoint or Lite selector.

    Reads ``tokenizer.json``, else ``vocab.json`` (Qwen2), else ``tokenizer.model`` (InternLM2).
    Ids are the checkpoint's own; the stock processor's ``<video>`` placeholder, which is replaced
    before any text reaches a model, is appended where the vocabulary lacks it.

    Raises
    ------
    CheckpointError
        None of these files is there, or the vocabulary has no ``<IMG_CONTEXT>``.
    """
    path = Path(path)
    tokenizer: PreTrainedTokenizerBase
    if (path / "tokenizer.json").is_file():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, **_SETTINGS)
    elif (path / "vocab.json").is_file():
        tokenizer = Qwen2Tokenizer.from_pretrained(path, **_SETTINGS)
    elif (path / "tokenizer.model").is_file():
        tokenizer = _sentencepiece_tokenizer(path)
    else:
        raise CheckpointError(
            f"{path} has no tokenizer: expected tokenizer.json, vocab.json with merges.txt, or "
            "tokenizer.model. Download the checkpoint whole."
        )
    if IMAGE_TOKENS["context_image_token"] not in added_tokens(path).values():
        raise CheckpointError(
            f"The tokenizer of {path} has no {IMAGE_TOKENS['context_image_token']} token, so it "
            "does not belong to an InternVL checkpoint. Download added_tokens.json and "
            "tokenizer_config.json with it."
        )
    return tokenizer


def added_tokens(path: str | Path) -> dict[int, str]:
    """Return id and text of the tokens a checkpoint adds to its base vocabulary."""
    path = Path(path)
    tokens: dict[int, str] = {}
    if (path / "tokenizer.json").is_file():
        entries = read_json(path / "tokenizer.json").get("added_tokens", [])
        tokens.update({entry["id"]: entry["content"] for entry in entries})
    if (path / "added_tokens.json").is_file():
        tokens.update({i: text for text, i in read_json(path / "added_tokens.json").items()})
    entries = _tokenizer_config(path).get("added_tokens_decoder", {})
    tokens.update({int(i): entry["content"] for i, entry in entries.items()})
    return dict(sorted(tokens.items()))


def _tokenizer_config(path: Path) -> dict[str, Any]:
    file = path / "tokenizer_config.json"
    return read_json(file) if file.is_file() else {}


# -- sentencepiece -----------------------------------------------------------------------------


def _sentencepiece_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Build the fast tokenizer that encodes as sentencepiece does with ``tokenizer.model``."""
    pieces, trainer, rules = _read_model(path / "tokenizer.model")
    if trainer.get(3, 1) != _BPE or not rules.get(5, 1):
        raise CheckpointError(
            f"{path / 'tokenizer.model'} is not the BPE model of an InternLM2 checkpoint. Convert "
            "it to a tokenizer.json with its own tools and put that beside it."
        )
    config = _tokenizer_config(path)
    added = added_tokens(path)
    names = [added.get(i, text) for i, (text, _, _) in enumerate(pieces)]
    vocabulary = {text: i for i, text in enumerate(names)}
    unknown = names[trainer.get(40, 0)]
    tokenizer = Tokenizer(
        BPE(
            vocab=vocabulary,
            merges=_merges(pieces, vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=bool(trainer.get(35, 0)),
        )
    )
    prefixed = bool(rules.get(3, 1))
    tokenizer.normalizer = _normalizer(rules, prefixed)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(content=" ", left=1)] if prefixed else []),
        ]
    )
    symbols = [text for text, _, kind in pieces if kind == _USER_DEFINED and text in vocabulary]
    if symbols and prefixed:
        logger.warning(
            "%s starts every text with a space and has symbols of its own (%s, …): text right "
            "after such a symbol gets another space here.",
            path / "tokenizer.model",
            symbols[0],
        )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in symbols])
    _add_special(tokenizer, added, path)
    special = {
        role: config.get(role) or default
        for role, default in (
            ("unk_token", unknown),
            ("bos_token", names[trainer.get(41, 1)]),
            ("eos_token", names[trainer.get(42, 2)]),
            ("pad_token", names[trainer.get(42, 2)]),
        )
    }
    texts = {k: v["content"] if isinstance(v, dict) else v for k, v in special.items()}
    # The remote class starts every text with BOS unless its configuration says otherwise.
    if config.get("add_bos_token", True):
        bos = texts["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos} $B",
            special_tokens=[(bos, tokenizer.token_to_id(bos))],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=config.get("model_max_length"),
        **_SETTINGS,
        **texts,
    )


def _normalizer(rules: dict[int, Any], prefixed: bool) -> Any:
    steps: list[Any] = []
    if rules.get(2):
        steps.append(normalizers.Precompiled(rules[2]))
    if rules.get(4, 1):
        steps += [
            normalizers.Replace(Regex("^ +| +$"), ""),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    if prefixed:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def _merges(
    pieces: list[tuple[str, float, int]], vocabulary: dict[str, int]
) -> list[tuple[str, str]]:
    """List every way to join two pieces into a third, the best-scored third first.

    A piece whose place an added token took is out of ``vocabulary`` and joins nothing.
    """
    ids = {
        text: i
        for i, (text, _, kind) in enumerate(pieces)
        if kind == _NORMAL and vocabulary.get(text) == i
    }
    found = [
        (-pieces[ids[text]][1], ids[text[:cut]], ids[text[cut:]])
        for text in ids
        for cut in range(1, len(text))
        if text[:cut] in ids and text[cut:] in ids
    ]
    return [(pieces[left][0], pieces[right][0]) for _, left, right in sorted(found)]


def _add_special(tokenizer: Tokenizer, added: dict[int, str], path: Path) -> None:
    """Mark the checkpoint's own tokens as special, those beyond the model appended in order."""
    for i, text in added.items():
        tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True)])
        if tokenizer.token_to_id(text) != i:
            raise CheckpointError(
                f"The added token {text} of {path} has id {i}, but its place in the vocabulary is "
                f"{tokenizer.token_to_id(text)}. Files of two checkpoints may be mixed."
            )


# -- protocol buffers --------------------------------------------------------------------------


def _read_model(
    file: Path,
) -> tuple[list[tuple[str, float, int]], dict[int, Any], dict[int, Any]]:
    """Read the pieces (text, score, type), trainer and normalizer settings of a model file.

    Settings are numbered as in sentencepiece_model.proto: trainer 3 model_type, 35 byte_fallback,
    40 unk_id, 41 bos_id, 42 eos_id; normalizer 2 precompiled_charsmap, 3 add_dummy_prefix,
    4 remove_extra_whitespaces, 5 escape_whitespaces.
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    rules: dict[int, Any] = {}
    try:
        for number, value in _fields(file.read_bytes()):
            if number == 1:
                entry = dict(_fields(value))
                score = struct.unpack("<f", entry.get(2, bytes(4)))[0]
                pieces.append((entry[1].decode("utf-8"), score, entry.get(3, _NORMAL)))
            elif number == 2:
                trainer = dict(_fields(value))
            elif number == 3:
                rules = dict(_fields(value))
    except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
        raise CheckpointError(
            f"{file} is damaged or no sentencepiece model ({error}). Download it again."
        ) from error
    if not pieces:
        raise CheckpointError(f"{file} holds no vocabulary. Download it again.")
    return pieces, trainer, rules


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield field number and raw value of a protocol buffers message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        size = {1: 8, 5: 4}.get(kind)
        if kind == 2:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise ValueError(f"unreadable field at byte {at}")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at
