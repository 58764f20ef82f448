"""The tests, and the run-time type checker that `make test TYPES=1` applies to all of jaxtrain."""

from beartype import BeartypeConf, beartype

# Accepts an int where a float is annotated, as PEP 484 does.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
