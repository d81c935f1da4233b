"""One step over all parameters: a rule for each group, release in backward, checkpoints."""
