"""A tokenizer of a few dozen whole words, with the special tokens of each real family.

Every word of the testbed's questions, answers and chat templates is one token, upper and lower
case alike; whitespace is dropped; any other word is ``<unk>``.
"""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ..core.errors import OptionError
from .locate import FAMILIES
from .questions import TASKS, phrase
from .scenes import COLOURS, DIGITS, SHAPES

UNKNOWN = "<unk>"
PAD = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SYSTEM_PROMPT = "You are a helpful assistant."

#: Special tokens of a family, by the name under which its processor looks them up.
VISION_TOKENS = {
    "qwen2_5_vl": {
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    },
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "llava_video": {"image_token": "<image>", "video_token": "<video>"},
}


def build_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Build the tokenizer of a family.

    Raises
    ------
    OptionError
        If the family is unknown.
    """
    if family not in FAMILIES:
        raise OptionError(f"family={family!r} is unknown; choose one of {', '.join(FAMILIES)}.")
    vision = VISION_TOKENS[family]
    special = [PAD, TURN_START, TURN_END, *vision.values()]
    vocabulary = {token: index for index, token in enumerate([*special, UNKNOWN, *_words()])}
    core = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    core.normalizer = normalizers.Sequence(
        [
            normalizers.Lowercase(),
            # InternVL numbers its frames. Spelt out, the numbers would be digits like any answer,
            # and those of a long video would never have been seen in training.
            normalizers.Replace(Regex(r"frame ?\d+:"), "frame"),
        ]
    )
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation(),
        ]
    )
    core.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=UNKNOWN,
        pad_token=PAD,
        eos_token=TURN_END,
        extra_special_tokens=vision,
        padding_side="left",
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )


def _words() -> list[str]:
    """List every word in a fixed order: answers first, then what questions and templates add."""
    texts = [SYSTEM_PROMPT, "system user assistant frame"]
    texts += [phrase(task, [(0, 0, 0), (1, 1, 1)])[0] for task in TASKS]
    known = dict.fromkeys((*COLOURS, *SHAPES, *DIGITS))
    for text in texts:
        for mark in "?,.":
            text = text.replace(mark, f" {mark} ")
        known.update(dict.fromkeys(text.lower().split()))
    return list(known)
