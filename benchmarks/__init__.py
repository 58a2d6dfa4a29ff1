"""How fast jaxrnn is, measured beside its peers: `python -m benchmarks`."""
