"""Verifies the checksums of checkpoints: python -m jaxtrain.checkpoint FILE..."""

import os
import signal
import sys

from jaxtrain.checkpoint import verify
from jaxtrain.errors import InputError, printable

status = 0 if len(sys.argv) > 1 else f"usage: {__doc__.split(': ')[1]}"
try:
    for file in sys.argv[1:]:
        try:
            verify(file)
            print(printable(f"{file}: intact"), flush=True)
        except InputError as error:
            print(error, flush=True)
            status = 1
except BrokenPipeError:  # the reader of the output has left, as in `| head -1`
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    status = 128 + signal.SIGPIPE
sys.exit(status)
