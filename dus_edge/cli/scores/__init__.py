"""The commands that judge models."""
