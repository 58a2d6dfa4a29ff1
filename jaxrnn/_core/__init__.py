"""The two loops over time and the rule that derives one from the other: arrays in, arrays out."""
