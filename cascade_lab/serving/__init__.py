"""The HTTP service of a cascade: its batches, its protocols, its limits and its traffic log."""
