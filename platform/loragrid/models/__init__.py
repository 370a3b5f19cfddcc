"""The frozen base: its weights, the hub, the cache, attention, activation checkpointing, sharding."""
