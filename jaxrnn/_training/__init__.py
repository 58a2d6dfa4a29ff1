"""A training run that is left alone: its text, its checkpoints, its devices, its directory."""
