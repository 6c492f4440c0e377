"""Weights as packed integers of 2 to 8 bits: any model's tensors, in memory and on disk (docs/packing.md)."""
