"""How divergence against size is shown: the frontier of files, from what was measured."""
