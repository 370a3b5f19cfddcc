"""Loads the frozen base: weights, hub, cache, attention, sharding."""
