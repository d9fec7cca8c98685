"""Running a model over batches to set statistics: the reference, the inference statistics."""
