"""The fused operations that the model is built from."""
