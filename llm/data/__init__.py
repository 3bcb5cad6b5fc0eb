"""Files in, tokenised rows out: formats, templates, counts, and the offline corpus."""
