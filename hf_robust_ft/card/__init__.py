"""The model card: what is known of a model and how it was measured, as markdown with pictures. Floor 3.

A card is made from files alone: ``robust_card.json`` (:class:`CardData`) and the reports that it names.
"""

from .data import CardData
from .readme import add_card
from .write import read_card, render_card, write_card

__all__ = ["CardData", "add_card", "read_card", "render_card", "write_card"]
