"""Model families as data: `family.py` reads one TOML for each architecture."""
