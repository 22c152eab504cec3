"""Adapters to other libraries' data formats."""
