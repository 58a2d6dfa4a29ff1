"""Other programs for the two loops, which take and return plain arrays."""
