"""Batched Qwen2-VL, Qwen2.5-VL and Qwen3-VL for robots: camera frames and texts to hidden states, features or text."""

from qwen_batched.inputs.batch import Features
from qwen_batched.model.modeling_qwen2_5_vl_batched import BatchedDecoder, BatchedVisionTransformer
from qwen_batched.model.prompt_cache import PromptCache
from qwen_batched.model.tensor_processor import TensorProcessor
from qwen_batched.outputs import GenerateOutput, VLOutput
from qwen_batched.qwen_batched_VL_model import BatchedVL, QwenBatchedVL

__all__ = [
    "BatchedDecoder",
    "BatchedVL",
    "BatchedVisionTransformer",
    "Features",
    "GenerateOutput",
    "PromptCache",
    "QwenBatchedVL",
    "TensorProcessor",
    "VLOutput",
]
