"""One step of the recurrence: its arithmetic, its forms, masks and options."""
