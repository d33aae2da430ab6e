"""EquilibriaError: the base of the project's own errors."""

from __future__ import annotations


class EquilibriaError(Exception):
    """Base of the errors that this project raises as complete sentences: what happened, and what to do about it.

    The command line prints such an error as it is. Invalid arguments raise plain ``ValueError`` and ``TypeError``, as
    elsewhere in Python.
    """


class UsageError(EquilibriaError, ValueError):
    """The command line asks for something that does not exist: exit code 2."""
