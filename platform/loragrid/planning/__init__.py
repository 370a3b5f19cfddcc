"""Predicts packs, memory and time before anything starts."""
