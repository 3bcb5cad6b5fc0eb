"""Figures from records: numbers in, Figure out. Nothing here simulates or reads arguments."""
