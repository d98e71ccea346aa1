"""Model files: what they are, where they come from."""
