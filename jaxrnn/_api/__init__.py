"""The public functions: each checks its arguments once and calls the core once."""
