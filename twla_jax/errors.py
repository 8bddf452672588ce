"""Defines the one exception type that stands for a user's mistake or an input that cannot be used."""

import re

# Letters of a long message that are kept: names in a stranger's file have any length.
_FIRST, _LAST = 1000, 500
_NOT_PLAIN = re.compile("[^ -~]")


class TwlaError(Exception):
    """A user's mistake or an unusable input, told in one line that names the file or the setting.

    The command line prints it as `twla: error: …` without a traceback. Anything else that escapes is a defect
    of this library.
    """

    def __init__(self, message: str):
        """Take the message; line ends in it, as of a file's name, become blanks; a long one loses its middle."""
        if len(message) > _FIRST + _LAST:
            message = f"{message[:_FIRST]}…{message[-_LAST:]}"
        super().__init__(_NOT_PLAIN.sub(_printable, message))


def _printable(letter: re.Match[str]) -> str:
    each = letter[0]
    return each if each.isprintable() else " " if each.isspace() else ascii(each)[1:-1]
