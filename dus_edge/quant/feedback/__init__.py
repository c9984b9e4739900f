"""Error feedback into GGUF blocks: GPTQ's propagation with the scales of block formats."""
