"""Convex analysis of forgetting: sequential against joint SFT + DPO (arXiv 2410.15483)."""
