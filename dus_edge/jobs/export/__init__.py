"""One file per command that writes a model."""
