"""The program `jaxrnn`: its commands and its training runs."""
