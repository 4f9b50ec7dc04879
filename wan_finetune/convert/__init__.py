"""Checkpoints as Wan's authors and ComfyUI publish them, made into a diffusers folder without holding one in memory."""
