"""The training loop: transformers' Trainer under a scheduler. It knows no command line."""
