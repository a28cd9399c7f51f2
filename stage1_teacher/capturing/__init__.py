"""The parts of a capture: what is missing, windows of examples, the teacher, batches, the way to disk."""
