"""A checkpoint folder: files to dataclasses and tensors, and back."""
