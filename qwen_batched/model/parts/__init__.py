"""The parts that vision transformers and decoders are built from."""
