"""From any data set to what a model is fed: sources, rows, pictures, prompts, labels, batches."""
