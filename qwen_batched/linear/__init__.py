"""How linear layers run: packed, with LoRA updates, or as plain modules."""
