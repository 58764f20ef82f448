"""Looks at a network and its training step without training it."""

from jaxtrain.inspect._port import check_module as check_module
from jaxtrain.inspect._port import port as port
from jaxtrain.inspect._port import without_dropout as without_dropout
from jaxtrain.inspect.compare import Cause, Comparison, PortDifference, compare
from jaxtrain.inspect.summary import Summary, summary
from jaxtrain.inspect.verify import Verification, verify

__all__ = [
    "Cause",
    "Comparison",
    "PortDifference",
    "Summary",
    "Verification",
    "compare",
    "summary",
    "verify",
]
