"""MLX's affine quantization: the stored form, and the codes that `mlx_lm.convert` writes."""
