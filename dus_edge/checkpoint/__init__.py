"""Sources of weights: typed configurations and lazily read safetensors."""
