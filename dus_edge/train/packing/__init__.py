"""Text as memory-mapped tokens, and which of them a step trains on."""
