"""The tokenizer: a token a word, whatever the case, and no number of a frame becomes an answer."""

import pytest

from flexselect.core.errors import OptionError
from flexselect.testbed.locate import FAMILIES
from flexselect.testbed.questions import TASKS, phrase
from flexselect.testbed.scenes import COLOURS, DIGITS, SHAPES
from flexselect.testbed.tokenizer import UNKNOWN, VISION_TOKENS, build_tokenizer


@pytest.fixture(params=FAMILIES)
def tokenizer(request):
    return build_tokenizer(request.param)


def test_every_answer_is_one_token_and_comes_back(tokenizer):
    for word in (*COLOURS, *SHAPES, *DIGITS):
        ids = tokenizer(word)["input_ids"]
        assert len(ids) == 1
        assert tokenizer.decode(ids) == word


def test_every_question_is_known_word_for_word(tokenizer):
    for task in TASKS:
        text, _ = phrase(task, [(0, 1, 2), (3, 4, 5)])
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        words = text.lower().replace("?", " ?").replace(",", " ,").split()
        assert tokenizer.convert_ids_to_tokens(ids) == words
        assert tokenizer(text.upper())["input_ids"] == ids


def test_other_words_are_unknown_and_numbers_are_read_digit_by_digit(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("Why 42?")["input_ids"])
    assert tokens == [UNKNOWN, "4", "2", "?"]


def test_frame_numbers_are_one_word(tokenizer):
    first, last = (tokenizer(f"Frame{n}: ")["input_ids"] for n in (1, 1024))
    assert first == last
    assert len(first) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_are_one_token_each_and_survive_saving(family, tmp_path):
    from transformers import AutoTokenizer

    build_tokenizer(family).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for name, token in VISION_TOKENS[family].items():
        ids = tokenizer(f"star{token}{token}")["input_ids"]
        assert tokenizer.convert_ids_to_tokens(ids) == ["star", token, token]
        assert getattr(tokenizer, name) == token
    assert tokenizer.decode(tokenizer("<|im_start|>")["input_ids"], skip_special_tokens=True) == ""
    assert tokenizer.padding_side == "left"


def test_an_unknown_family_is_refused():
    with pytest.raises(OptionError, match="gpt"):
        build_tokenizer("gpt")
