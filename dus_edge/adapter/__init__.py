"""LoRA adapters: read strictly, and merged into a checkpoint as its rows are read."""
