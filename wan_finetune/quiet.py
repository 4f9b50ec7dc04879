"""Keeping libraries' own progress bars out of our output."""


def quiet_libraries() -> None:
    """Turn off the weight-loading bars of diffusers and transformers; their warnings stay."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
