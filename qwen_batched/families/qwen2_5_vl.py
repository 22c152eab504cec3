"""Qwen2.5-VL (arXiv:2502.13923); numbers are the defaults of transformers' configuration classes."""

from qwen_batched.checkpoint.config import ImageConfig, QwenVLConfig, TextConfig, VisionConfig
from qwen_batched.checkpoint.keys import TEXT_PREFIX, VISION_PREFIX, KeyLayout
from qwen_batched.families.family import Family, PromptStyle

FAMILY = Family(
    config=QwenVLConfig(
        model_type="qwen2_5_vl",
        vision=VisionConfig(
            depth=32,
            hidden_size=3584,
            intermediate_size=3420,
            num_heads=16,
            in_channels=3,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            out_hidden_size=3584,
            hidden_act="silu",
            rope_theta=10000.0,
            window_size=112,
            fullatt_block_indexes=(7, 15, 23, 31),
        ),
        text=TextConfig(
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
        ),
        image_token_id=151655,
    ),
    image=ImageConfig(
        min_pixels=56 * 56,
        max_pixels=28 * 28 * 1280,
        patch_size=14,
        temporal_patch_size=2,
        merge_size=2,
        rescale_factor=1 / 255,
        image_mean=(0.48145466, 0.4578275, 0.40821073),  # CLIP's, as is the deviation
        image_std=(0.26862954, 0.26130258, 0.27577711),
    ),
    image_processor="Qwen2VLImageProcessor",
    # Published are the modules' own names.
    keys=KeyLayout(
        adapters=(("model.visual.", VISION_PREFIX), ("model.language_model.", TEXT_PREFIX)),
        # Saved from `Qwen2_5_VLModel`, which has no head; its "visual." is the published one.
        others=(("language_model.", TEXT_PREFIX),),
    ),
    prompt=PromptStyle(
        image_token="<|image_pad|>",
        image="<|vision_start|><|image_pad|><|vision_end|>",
        default_pad="<|endoftext|>",
        control_tokens=(
            *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
            *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>"),
            *("<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>"),
            *("</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>"),
            *("<|repo_name|>", "<|file_sep|>"),
        ),
    ),
)
