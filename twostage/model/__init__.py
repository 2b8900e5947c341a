"""The encoder and the files that it is stored in."""
