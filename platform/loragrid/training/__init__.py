"""Trains one pack: batches, step, loss, loop, CUDA graphs, checks."""
