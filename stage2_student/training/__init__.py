"""The parts of a training run: inputs, order, feed, student, step, trainer, export."""
