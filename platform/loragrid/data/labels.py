"""The label that marks a token as not learnt; apart, so that a step's code imports no configuration."""

IGNORED = -100
"""The target of a token that does not count in the loss, as in torch and transformers."""
