"""Kernels that run a whole loop over time with W resident on the chip. Imported on first use."""
