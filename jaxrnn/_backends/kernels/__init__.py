"""Kernels that run a whole loop over time on the chip, W resident there. Imported where used."""
