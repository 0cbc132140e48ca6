"""The one exception for wrong input: the command line prints its message alone, without a traceback."""


class InputError(ValueError):
    """Something that the user gave is wrong. The message says what, where, and what to do, in one line."""
