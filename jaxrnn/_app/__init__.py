"""The program `jaxrnn`: its commands, and the training run that they begin, read and show."""
