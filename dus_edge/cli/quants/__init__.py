"""The commands and options that say how tensors are stored."""
