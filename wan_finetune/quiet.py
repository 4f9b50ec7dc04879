"""Keeping libraries' own progress bars out of our output."""

import logging


def quiet_libraries() -> None:
    """Turn off the weight-loading bars of diffusers and transformers; their warnings stay.

    Where DeepSpeed is installed, importing it on a CPU warns of that, in runs that have nothing to do with it too.
    """
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
