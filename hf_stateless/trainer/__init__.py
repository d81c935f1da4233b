"""From a model and an optimizer name to the optimizer: names, options, partition, factories."""
