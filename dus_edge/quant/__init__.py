"""Block formats, presets and quantizers."""
