"""Defines the one exception type that stands for a user's mistake or an input that cannot be used."""

_LONGEST = 1500  # letters of a message: names in a stranger's file have any length


class TwlaError(Exception):
    """A user's mistake or an unusable input, told in one line that names the file or the setting.

    The command line prints it as `twla: error: …` without a traceback. Anything else that escapes is a defect
    of this library.
    """

    def __init__(self, message: str):
        """Take the message; line ends in it, as of a file's name, become blanks, and a long one is cut."""
        line = "".join(
            each if each.isprintable() else " " if each.isspace() else ascii(each)[1:-1]
            for each in message[: _LONGEST + 1]
        )
        super().__init__(line if len(message) <= _LONGEST else f"{line[:_LONGEST]}…")
