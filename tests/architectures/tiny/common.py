"""What the tiny models of all families share: a byte-level tokenizer and weights that attend."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

PAD = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"

#: Messages in the format of Qwen2, which the language models of all three families share; a
#: family fills in how it writes an image and a video.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' -}}"
    "{%- if message['content'] is string -%}"
    "{{- message['content'] -}}"
    "{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'text' -%}{{- part['text'] -}}"
    "{%- elif part['type'] == 'image' -%}{{- 'IMAGE' -}}"
    "{%- elif part['type'] == 'video' -%}{{- 'VIDEO' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def chat_template(*, image: str, video: str) -> str:
    """Fill in how a family writes an image and a video."""
    escaped = {name: text.replace("\n", "\\n") for name, text in [("I", image), ("V", video)]}
    return CHAT_TEMPLATE.replace("IMAGE", escaped["I"]).replace("VIDEO", escaped["V"])


def byte_tokenizer(vision: dict[str, str]) -> PreTrainedTokenizerFast:
    """Build a tokenizer of the 256 bytes and the special tokens, by their name in the family.

    Any text is a sequence of known tokens and decodes to itself.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = [PAD, TURN_START, TURN_END, *vision.values()]
    core.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=TURN_END,
        extra_special_tokens=vision,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def draw_weights(model: nn.Module, seed: int) -> Any:
    """Draw every weight anew, large enough that attention is far from even and logits differ."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=draw)
            if weight.ndim == 1 and name.endswith("weight"):
                weight.copy_(1 + 0.1 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.1 * noise)
            elif "embed" in name and weight.ndim == 2:
                weight.copy_(noise)
            else:
                gain = 1.4 if "q_proj" in name or "k_proj" in name else 1.0
                weight.copy_(gain * noise / weight[0].numel() ** 0.5)
    return model.eval()
