"""Ollama Modelfiles and chat templates."""
