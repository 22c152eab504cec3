"""A call's arguments, checked and prepared: frames and texts to tensors."""
