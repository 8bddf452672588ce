"""Defines the one exception type that stands for a user's mistake or an input that cannot be used."""


class TwlaError(Exception):
    """A user's mistake or an unusable input, told in one line that names the file or the setting.

    The command line prints it as `twla: error: …` without a traceback. Anything else that escapes is a defect
    of this library.
    """
