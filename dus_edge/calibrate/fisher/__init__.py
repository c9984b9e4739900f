"""Gradients of a model's own predictions, and what is made of their squares."""
