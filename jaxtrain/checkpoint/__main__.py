"""Verifies the checksums of checkpoints: python -m jaxtrain.checkpoint FILE..."""

import sys

from jaxtrain.checkpoint import verify
from jaxtrain.errors import InputError, printable

status = 0 if len(sys.argv) > 1 else f"usage: {__doc__.split(': ')[1]}"
for file in sys.argv[1:]:
    try:
        verify(file)
        print(printable(f"{file}: intact"))
    except InputError as error:
        print(error)
        status = 1
sys.exit(status)
