"""The commands that let a model talk: chat, serve."""
