"""The two objectives on a language model: rows to batches, batches to losses."""
