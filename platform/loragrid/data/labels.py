"""The label of tokens that are not learnt; a separate file, because a step's code must import no configuration."""

IGNORED = -100
"""The target of a token that does not count in the loss, as in torch and transformers."""
