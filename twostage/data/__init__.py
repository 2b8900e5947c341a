"""From tables of text to batches of packed tokens."""
