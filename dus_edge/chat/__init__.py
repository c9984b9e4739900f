"""Talking with a model: in a terminal, and as a server of the OpenAI API."""
