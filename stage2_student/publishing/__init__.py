"""What leaves a run for others: the model card of an export, and its way to the Hub."""
