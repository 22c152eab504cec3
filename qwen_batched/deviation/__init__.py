"""How far the results are from transformers', stage by stage: `python -m qwen_batched.deviation --help`."""
