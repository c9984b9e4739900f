"""Servers of the OpenAI API that others wrote, with a model of ours behind and a guard in front."""
