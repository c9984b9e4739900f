"""Mixes of types for a budget: the candidates, the choice, what is fixed by hand, the file."""
