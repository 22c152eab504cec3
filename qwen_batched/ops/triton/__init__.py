"""Triton implementations of the fused operations: kernel and launcher, one file an operation. Imports triton."""
