"""A worker: one training process with its queue of packs, their states and reports, recovery and export."""
