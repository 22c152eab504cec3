"""Qwen3-VL (arXiv:2511.21631), dense; numbers are the defaults of transformers' configuration classes."""

from qwen_batched.checkpoint.config import ImageConfig, QwenVLConfig, TextConfig, VisionConfig
from qwen_batched.checkpoint.keys import KeyLayout
from qwen_batched.families.family import Family
from qwen_batched.families.qwen import CODE_TOKENS, HEADLESS, NESTED, SPECIAL_TOKENS, TOKEN_IDS, prompt_style

THINKING_TOKENS = ("<tool_response>", "</tool_response>", "<think>", "</think>")

VISION = VisionConfig(
    depth=27,
    hidden_size=1152,
    intermediate_size=4304,
    num_heads=16,
    in_channels=3,
    patch_size=16,
    spatial_merge_size=2,
    temporal_patch_size=2,
    out_hidden_size=3584,
    hidden_act="gelu_pytorch_tanh",
    rope_theta=10000.0,
    num_position_embeddings=48 * 48,
    deepstack_visual_indexes=(8, 16, 24),
)
TEXT = TextConfig(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=22016,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    rms_norm_eps=1e-6,
    max_position_embeddings=128000,
    rope_theta=500000.0,
    mrope_section=(24, 20, 20),
    hidden_act="silu",
    explicit_head_dim=128,
)
FAMILY = Family(
    config=QwenVLConfig(model_type="qwen3_vl", vision=VISION, text=TEXT, image_token_id=151655),
    token_ids=TOKEN_IDS,
    image=ImageConfig(
        min_pixels=65536,
        max_pixels=16777216,
        patch_size=16,
        temporal_patch_size=2,
        merge_size=2,
        rescale_factor=1 / 255,
        image_mean=(0.5, 0.5, 0.5),
        image_std=(0.5, 0.5, 0.5),
    ),
    image_processor="Qwen2VLImageProcessorFast",
    keys=KeyLayout(adapters=NESTED, others=HEADLESS, saved=NESTED),
    prompt=prompt_style((*SPECIAL_TOKENS, *CODE_TOKENS, *THINKING_TOKENS)),
    fixed={"attention_bias": False},
    genai_type="qwen3_vl",
)
