"""The commands of ``python -m ecodiff``: thin layers over the public functions, one module each.

A command's module has a docstring (its first line says what the command does, its last lines give one example),
`add_arguments`, and `run`, which returns what the command found as a dict; `ecodiff.__main__` prints that.
"""
