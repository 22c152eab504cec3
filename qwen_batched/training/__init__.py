"""Checkpointing, process groups and the methods that training code expects of a model."""
