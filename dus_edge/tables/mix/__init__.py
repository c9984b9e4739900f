"""How mixes of types are shown."""
