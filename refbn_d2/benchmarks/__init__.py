"""What norms cost: time, memory, communication."""
