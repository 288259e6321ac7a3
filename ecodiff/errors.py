"""The one error that a user of this package meets."""


class EcoDiffError(ValueError):
    """Something the caller can put right: one sentence that says what, where and what to do."""
