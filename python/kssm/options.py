"""What is wrong with an option, told to the user."""

__all__ = ["UsageError", "flag"]


class UsageError(Exception):
    """One line for the user: what was got, what was wanted. The command line prints it and exits with code 2."""


def flag(name: str) -> str:
    """An option's name on the command line.

    >>> flag("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")
