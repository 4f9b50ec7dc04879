"""Keeping libraries' own progress bars out of our output."""

import logging

CHATTY = (
    "torchao",
    "torch.utils._pytree",
    "bitsandbytes.backends.cpu.ops",
    "diffusers.quantizers.torchao.torchao_quantizer",
)
"""Loggers that warn, on import, of parts which this machine lacks and nobody has asked for."""


def quiet_imports() -> None:
    """Before diffusers is imported, which imports the quantisation packages that are installed, used or not."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def quiet_libraries() -> None:
    """Turn off the weight-loading bars of diffusers and transformers; their warnings stay.

    Where DeepSpeed is installed, importing it on a CPU warns of that, in runs that have nothing to do with it too.
    """
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
