"""Pruning attached to a Hugging Face model: the loop over its layers, what it records, what it costs."""
