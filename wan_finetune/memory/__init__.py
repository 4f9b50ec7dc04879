"""Fitting an expert into the memory there is: quantised bases, recomputed or offloaded activations, streamed blocks."""
