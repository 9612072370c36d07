"""The one exception a user sees for a mistake of theirs, and those that a model raises which is tried in a way that it does not know."""


class WeftError(Exception):
    """The user's mistake: the message says what is wrong, where, and what to write instead.

    The command line prints it without a traceback and exits with code 2. Anything else that escapes is our own fault.
    """


FAILS = (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError, AssertionError)
