"""Joint SFT and DPO post-training of causal language models (arXiv 2410.15483)."""
