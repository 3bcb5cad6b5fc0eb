"""Algorithms x lambda or split x seeds on language models, each at its own best learning rate."""
