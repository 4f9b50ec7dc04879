"""The one exception that is the user's to mend."""


class InputError(ValueError):
    """Bad input: a file, a configuration key, a folder. The message says what, where and what to do.

    The commands print it as one line on standard error and end with exit code 2.
    """
