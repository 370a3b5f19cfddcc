"""What a training process does with its queue of packs: states, reports, recovery, export."""
