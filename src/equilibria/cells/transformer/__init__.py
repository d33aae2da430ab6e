"""The cell of the DEQ-Transformer."""
