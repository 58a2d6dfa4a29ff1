"""The two loops over time and the derivative rule that connects them: arrays in, arrays out."""
