"""The one exception that a recipe raises for a user's mistake."""

from __future__ import annotations


class InputError(ValueError):
    """Wrong option, unreadable data or unknown model: nothing was written.

    The command line prints its message as one line and exits with code 2.
    """
