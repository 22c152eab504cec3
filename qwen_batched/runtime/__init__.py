"""How calls are run on a GPU: captured once, replayed as CUDA graphs. Knows nothing of any model."""
