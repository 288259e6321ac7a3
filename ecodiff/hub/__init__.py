"""Giving a pruned pipeline away: how it was made, its model card, and its upload to the Hub."""

from ecodiff.lazy import names_of

_HOMES = {"made": ("read_made", "write_made"), "card": ("write_card",), "push": ("Pushed", "push")}

__getattr__, __dir__, __all__ = names_of(__name__, _HOMES)
