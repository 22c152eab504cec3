"""A byte-level BPE tokenizer with Qwen2's rules, learnt from a page of text, and its files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from qwen_batched.testing.config_files import write_json
from qwen_batched.testing.presets import Config

# Qwen's added tokens in the order of their ids; from <tool_call> on they are not "special", so decoding keeps them.
SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
ADDED_TOKENS = (
    *SPECIAL_TOKENS,
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)

# The template text of the published Qwen2.5-VL checkpoints.
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# The same of Qwen3-VL, but for tools and videos.
CHAT_TEMPLATE_3 = (
    "{%- if messages[0].role == 'system' %}"
    "{{- '<|im_start|>system\\n' }}"
    "{%- if messages[0].content is string %}{{- messages[0].content }}"
    "{%- else %}{%- for content in messages[0].content %}"
    "{%- if 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endif %}"
    "{%- set image_count = namespace(value=0) %}"
    "{%- for message in messages %}"
    "{%- if message.role != 'system' %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for content in message.content %}"
    "{%- if content.type == 'image' or 'image' in content or 'image_url' in content %}"
    "{%- set image_count.value = image_count.value + 1 %}"
    "{%- if add_vision_id %}Picture {{ image_count.value }}: {% endif -%}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{%- elif 'text' in content %}{{- content.text }}{%- endif %}{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

BPE_VOCAB_SIZE = 432

# Qwen2's own split into words, before any merge.
_SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What the merges are learnt from: enough for words with and without a leading space, runs of spaces and newlines,
# punctuation before newlines, accents, and characters that are several bytes (so that some merge, and others do not).
_TRAINING_TEXT = """\
Pick up the red block and place it on the blue plate. Pick up the green cup and put it in the sink.
Open the top drawer, then close the bottom drawer. Move the gripper to the left of the robot arm.
What is the robot doing in this picture? The robot is picking up the block. Describe the image.
Describe the picture. The image shows a table with a cup, a plate and a block on the table.

You are a helpful assistant. You are the system. The user asks, the assistant answers.
system user assistant system user assistant user assistant

It's the robot's arm; it doesn't move. I'm sure we've seen that they're here, and he'll say he'd go.
IT'S THE ROBOT'S ARM. IT DOESN'T MOVE.


def move(arm, speed):
    if speed > 0:
        arm.move(speed)
    return arm

def place(arm, block):
    if block:
        arm.place(block)
    return arm


把红色的积木放在盘子上。把蓝色的积木放在桌子上。把杯子放在桌子上。
機器人 ロボット ロボット 로봇 로봇 café café naïve naïve 🤖 🤖 🦾
"""


def added_tokens(family: str) -> tuple[str, ...]:
    """Returns the added tokens of a family's published tokenizers, in the order of their ids."""
    more = ("<tool_response>", "</tool_response>", "<think>", "</think>") if family == "qwen3_vl" else ()
    return SPECIAL_TOKENS if family == "qwen2_vl" else (*ADDED_TOKENS, *more)


def build_tokenizer(token_ids: Mapping[str, int]) -> Tokenizer:
    """Returns a byte-level BPE tokenizer with Qwen2's rules and the added tokens at the given ids."""
    start = token_ids[ADDED_TOKENS[0]]
    trained, alphabet = _bare_tokenizer(models.BPE()), pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_VOCAB_SIZE, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator([_TRAINING_TEXT], trainer)
    learnt = json.loads(trained.to_str())["model"]
    # `tokenizers` numbers added tokens from the end of the vocabulary, whatever ids a file asks for. A gap is
    # therefore filled with tokens that no merge makes.
    fillers = {f"<unused{index}>": index for index in range(len(learnt["vocab"]), start)}
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in learnt["merges"]]
    tokenizer = _bare_tokenizer(models.BPE(vocab=learnt["vocab"] | fillers, merges=merges))
    # One call for each kind keeps their order, and with it their ids.
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    others = [token for token in token_ids if token not in SPECIAL_TOKENS]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in others])
    assert all(tokenizer.token_to_id(token) == index for token, index in token_ids.items())
    return tokenizer


def _bare_tokenizer(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_SPLIT_PATTERN), behavior="isolated")
    flags = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(**flags)])
    tokenizer.post_processor, tokenizer.decoder = processors.ByteLevel(**flags), decoders.ByteLevel(**flags)
    return tokenizer


def write_tokenizer(folder: Path, token_ids: Mapping[str, int], family: str = "qwen2_5_vl") -> None:
    """Writes every file of the tokenizer, chat template included."""
    tokenizer = json.loads(build_tokenizer(token_ids).to_str())
    model = tokenizer["model"]
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "vocab.json", model["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    template = CHAT_TEMPLATE_3 if family == "qwen3_vl" else CHAT_TEMPLATE
    write_json(folder / "tokenizer_config.json", _tokenizer_config(token_ids, template))
    write_json(folder / "chat_template.json", {"chat_template": template})


def _tokenizer_config(token_ids: Mapping[str, int], template: str) -> Config:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(index): {"content": token, **flags, "special": token in SPECIAL_TOKENS}
            for token, index in token_ids.items()
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
