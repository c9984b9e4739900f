"""The hub: what is fetched from it, and how little of it is believed."""
