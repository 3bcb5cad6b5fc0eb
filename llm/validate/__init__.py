"""P1 to P6 on a comparison of language models, and what explains a prediction that fails."""
