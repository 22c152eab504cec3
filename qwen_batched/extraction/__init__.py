"""Features of data sets: `python -m qwen_batched.extract` writes them, `FeatureDataset` reads them."""

from qwen_batched.extraction.reading import FeatureDataset

__all__ = ["FeatureDataset"]
