"""Batches of other libraries -> the arguments of `QwenBatchedVL`, without importing those libraries."""
