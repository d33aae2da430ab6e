"""The cell of TrellisNet."""
