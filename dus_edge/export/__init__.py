"""Sinks: Hugging Face safetensors and GGUF."""
