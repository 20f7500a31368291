"""Writes the sentencepiece models of this folder and what sentencepiece itself makes of sentences.

Run by hand where sentencepiece is installed; the tests read the committed result:
    python tests/internvl/data/make_sentencepiece.py
"""

# ruff: noqa: RUF001  (full-width characters are what is tested)

import json
import os
import random
from pathlib import Path

import sentencepiece

HERE = Path(__file__).parent
WORDS = """
a the video shows red blue star circle number frame person walking street chart speaker when where
does first last what is on table answer option house and of to in with for it they then after before
two three four children playing camera moves slowly across room kitchen cooking pancake flips rocket
launch nasa moon earth
"""
CHARACTERS = "the red star  \n\tabcxyzABC0123456789?.!:Ａ？视频中é😀[]"
COMMON = {
    "byte_fallback": True,
    "character_coverage": 0.995,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": -1,
    "split_digits": True,
    "num_threads": 1,
    "minloglevel": 2,
}


def corpus() -> list[str]:
    random.seed(0)
    words = WORDS.split()
    lines = []
    for _ in range(3000):
        line = " ".join(random.choice(words) for _ in range(random.randint(3, 14)))
        if random.random() < 0.5:
            line = line.capitalize() + random.choice(".?!")
        if random.random() < 0.2:
            line += " 视频 中 的 人 在 做 什么 ？"
        lines.append(line)
    return lines


def main() -> None:
    os.chdir(HERE)  # the models record the paths they were trained with
    lines = corpus()
    rules = HERE / "rules.tsv"
    rules.write_text("FF21\t41\nFF1F\t3F\n9\t20\nA\t20\n")
    train = sentencepiece.SentencePieceTrainer.train
    # As InternLM2's: text is taken as it is. Some pieces are placeholders for tokens to come.
    train(
        sentence_iterator=iter(lines),
        model_prefix="plain",
        model_type="bpe",
        vocab_size=640,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=[f"[UNUSED_TOKEN_{i}]" for i in range(6)],
        **COMMON,
    )
    # Everything the other one leaves alone.
    train(
        sentence_iterator=iter(lines),
        model_prefix="prefix",
        model_type="bpe",
        vocab_size=500,
        normalization_rule_tsv=rules.name,
        add_dummy_prefix=True,
        remove_extra_whitespaces=True,
        **COMMON,
    )
    train(
        sentence_iterator=iter(lines),
        model_prefix="unigram",
        model_type="unigram",
        vocab_size=150,
        normalization_rule_name="identity",
        **{**COMMON, "byte_fallback": False},
    )
    random.seed(1)
    texts = ["", " ", "\n", "Hello  the red star?", "视频中的人在做什么？", "é😀\t[x]"]
    texts += ["".join(random.choices(CHARACTERS, k=random.randint(1, 30))) for _ in range(60)]
    texts += [" ".join(random.choices(WORDS.split(), k=random.randint(1, 12))) for _ in range(34)]
    expected = {"texts": texts}
    for name in ("plain", "prefix"):
        model = sentencepiece.SentencePieceProcessor(model_file=str(HERE / f"{name}.model"))
        expected[name] = [model.encode(text) for text in texts]
        expected[f"{name}_size"] = model.get_piece_size()
    (HERE / "sentencepiece.json").write_text(json.dumps(expected, ensure_ascii=False) + "\n")
    for leftover in (rules, *HERE.glob("*.vocab")):
        leftover.unlink()


if __name__ == "__main__":
    main()
