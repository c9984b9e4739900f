"""Measuring models: what a quantized file has lost against the one that it was made from."""
