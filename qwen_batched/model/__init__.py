"""The model's parts: processor, prompts, geometry, vision transformer, decoder."""
