"""Clips and captions to buckets, caches and batches. Knows no model: encoders come in as functions."""
