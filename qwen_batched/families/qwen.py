"""What the Qwen families share; numbers are the defaults of transformers' configuration classes."""

from qwen_batched.checkpoint.config import ImageConfig, TextConfig
from qwen_batched.checkpoint.keys import TEXT_PREFIX, VISION_PREFIX, KeyLayout
from qwen_batched.families.family import PromptStyle

NESTED = (("model.visual.", VISION_PREFIX), ("model.language_model.", TEXT_PREFIX))
# Saved from transformers' model without a head; its "visual." is the modules' own name.
HEADLESS = (("language_model.", TEXT_PREFIX),)
NAMED_AS_MODULES = KeyLayout(adapters=NESTED, others=HEADLESS)  # published are the modules' own names

TEXT = TextConfig(
    vocab_size=152064,
    hidden_size=8192,
    intermediate_size=29568,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=32768,
    rope_theta=1000000.0,
    mrope_section=(16, 24, 24),
    hidden_act="silu",
)
CLIP_IMAGE = ImageConfig(
    min_pixels=56 * 56,
    max_pixels=28 * 28 * 1280,
    patch_size=14,
    temporal_patch_size=2,
    merge_size=2,
    rescale_factor=1 / 255,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
)

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
    *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
TOKEN_IDS = {"video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653}
CODE_TOKENS = (
    *("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
    *("<|repo_name|>", "<|file_sep|>"),
)


def prompt_style(control_tokens: tuple[str, ...]) -> PromptStyle:
    """Images between two tokens."""
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    return PromptStyle("<|image_pad|>", image, default_pad="<|endoftext|>", control_tokens=control_tokens)
