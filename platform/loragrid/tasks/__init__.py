"""Task kinds: what is scored beside the loss, one file per kind; imports no torch."""
