"""The embedded model: weights, the procedural world it was trained on, and the script that trained it."""
