"""A language model of Pythia's shape from scratch, as a base for experiments on joint training."""
