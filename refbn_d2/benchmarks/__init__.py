"""Benchmarks of the norms: time, memory and communication."""
