"""The commands that say which layers to repeat."""
