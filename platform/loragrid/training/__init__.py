"""Training of one pack: batches, loss, step, loop, CUDA graphs, checks, meters."""
