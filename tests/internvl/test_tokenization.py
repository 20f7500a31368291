"""The fast tokenizer encodes as sentencepiece does; its committed answers are the test."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, Qwen2Tokenizer

from flexselect.core.errors import CheckpointError
from flexselect.internvl.tokenization import added_tokens, load_tokenizer

DATA = Path(__file__).parent / "data"
EXPECTED = json.loads((DATA / "sentencepiece.json").read_text())
Folder = Callable[..., Path]


@pytest.mark.parametrize("name", ["plain", "prefix"])
def test_ids_are_those_of_sentencepiece(name: str, sentencepiece_folder: Folder) -> None:
    folder = sentencepiece_folder(name, chat_at=7 if name == "plain" else None)
    tokenizer = load_tokenizer(folder)
    for text, ids in zip(EXPECTED["texts"], EXPECTED[name], strict=True):
        assert tokenizer(text)["input_ids"] == [1, *ids], text


def test_text_survives(sentencepiece_folder: Folder) -> None:
    tokenizer = load_tokenizer(sentencepiece_folder())
    for text in EXPECTED["texts"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_added_tokens_keep_the_checkpoints_ids(sentencepiece_folder: Folder) -> None:
    folder = sentencepiece_folder("plain", chat_at=7)
    tokenizer = load_tokenizer(folder)
    size = EXPECTED["plain_size"]
    assert added_tokens(folder) == {
        7: "<|im_end|>",
        8: "<|im_start|>",
        size: "<img>",
        size + 1: "</img>",
        size + 2: "<IMG_CONTEXT>",
    }
    ids = tokenizer("<|im_start|>red<img><IMG_CONTEXT></img><|im_end|>")["input_ids"]
    assert (ids[1], ids[-1]) == (8, 7)
    assert ids[-4:-1] == [size, size + 2, size + 1]
    assert tokenizer.start_image_token_id == size
    assert tokenizer.end_image_token_id == size + 1
    assert tokenizer.context_image_token_id == size + 2
    assert tokenizer.decode(ids[1:], skip_special_tokens=True) == "red"


def test_replaced_piece_is_gone(sentencepiece_folder: Folder) -> None:
    size = EXPECTED["plain_size"]
    tokenizer = load_tokenizer(sentencepiece_folder(chat_at=size - 2))
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == size - 2
    for text in EXPECTED["texts"]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert not {size - 2, size - 1} & set(ids)
        assert tokenizer.decode(ids) == text


def test_bos_follows_the_configuration(sentencepiece_folder: Folder) -> None:
    assert load_tokenizer(sentencepiece_folder())("red")["input_ids"][0] == 1
    assert 1 not in load_tokenizer(sentencepiece_folder(add_bos_token=False))("red")["input_ids"]


def test_saved_tokenizer_is_the_same(sentencepiece_folder: Folder, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_folder())
    tokenizer.save_pretrained(tmp_path / "saved")
    for again in (
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
        load_tokenizer(tmp_path / "saved"),
    ):
        assert again.padding_side == "left"
        assert again.context_image_token == "<IMG_CONTEXT>"
        for text in [*EXPECTED["texts"], "<|im_start|>a<img></img><video>"]:
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_qwen2_files(tmp_path: Path) -> None:
    characters = "abcdefghijklmnopqrstuvwxyzĠĊ"
    vocabulary = {c: i for i, c in enumerate(characters)} | {"re": 28, "red": 29}
    added = {"<|im_start|>": 30, "<|im_end|>": 31, "<img>": 32, "</img>": 33, "<IMG_CONTEXT>": 34}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nre d\n")
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    decoder = {str(i): {"content": t, "special": True} for t, i in added.items()}
    settings = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, Qwen2Tokenizer)
    assert tokenizer("<|im_start|>red a<img><IMG_CONTEXT></img><|im_end|>")["input_ids"] == (
        [30, 29, 26, 0, 32, 34, 33, 31]
    )
    assert tokenizer.context_image_token_id == 34
    assert tokenizer.padding_side == "left"


def test_unigram_model_is_refused(sentencepiece_folder: Folder) -> None:
    folder = sentencepiece_folder()
    (folder / "tokenizer.model").write_bytes((DATA / "unigram.model").read_bytes())
    with pytest.raises(CheckpointError, match="not the BPE model"):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", b"\x0a\xff\xff\x7f"])
def test_damaged_model_is_named(content: bytes, sentencepiece_folder: Folder) -> None:
    folder = sentencepiece_folder()
    (folder / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model"):
        load_tokenizer(folder)


@pytest.mark.parametrize("cut", [1, 5000, 9000])
def test_truncated_model_never_loads_as_another(cut: int, sentencepiece_folder: Folder) -> None:
    folder = sentencepiece_folder()
    data = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(data[:cut])
    with pytest.raises(CheckpointError):
        load_tokenizer(folder)


def test_ids_of_another_checkpoint_are_noticed(sentencepiece_folder: Folder) -> None:
    folder = sentencepiece_folder()
    (folder / "added_tokens.json").write_text(json.dumps({"<img>": 900, "<IMG_CONTEXT>": 901}))
    with pytest.raises(CheckpointError, match=r"<img> .* has id 900"):
        load_tokenizer(folder)


def test_language_tokenizer_is_refused(sentencepiece_folder: Folder, tmp_path: Path) -> None:
    folder = sentencepiece_folder()
    (folder / "added_tokens.json").unlink()
    with pytest.raises(CheckpointError, match="no <IMG_CONTEXT>"):
        load_tokenizer(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(tmp_path / "empty")
