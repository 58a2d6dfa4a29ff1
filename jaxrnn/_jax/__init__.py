"""What JAX lacks; it knows nothing of networks."""
