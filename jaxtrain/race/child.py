"""A script that calls a function in a process of its own: `python child.py CALL RESULT`.

It imports nothing but what the function needs, so that the peak memory of the process is its own.
"""

from __future__ import annotations

import pickle
import sys
from typing import Any


def run(call: str, result: str) -> None:
    """Makes the call that a file contains, and writes what it returns or raises."""
    outcome: Any
    with open(call, "rb") as file:
        sys.path[:] = pickle.load(file)
        try:
            function, arguments = pickle.load(file)
            outcome = (None, function(*arguments))
        except Exception as error:  # of any part of the function
            outcome = ([base.__name__ for base in type(error).__mro__], str(error))
    with open(result, "wb") as file:
        pickle.dump(outcome, file)


if __name__ == "__main__":
    run(*sys.argv[1:])
