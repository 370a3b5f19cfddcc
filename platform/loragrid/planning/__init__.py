"""Predicts packs, memory and time before anything is started."""
