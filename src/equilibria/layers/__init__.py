"""Layers: modules around a map, for any inputs and any state."""
