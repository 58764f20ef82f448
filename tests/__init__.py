"""The tests, and the run-time type checker that `make check` puts on every function of jaxtrain."""

from beartype import BeartypeConf, beartype

# An int passes for a float, as PEP 484 has it.
checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
