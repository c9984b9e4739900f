"""Calibration: text, tokens, and what a model's activations say about its weights."""
