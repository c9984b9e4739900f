"""A finished GGUF as a base: found, checked, copied by ranges or dequantized by rows."""
