"""Options of how models are quantized."""
