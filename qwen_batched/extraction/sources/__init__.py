"""Data sets of every form, read alike."""
