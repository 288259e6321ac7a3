"""The commands of the lab: name -> module (see ``ecodiff/__main__.py``)."""

COMMANDS = {
    "study": "ecodiff.lab.studies.command",
    "zoo": "ecodiff.lab.zoo.command",
    "book": "ecodiff.lab.book.command",
    "benchmark": "ecodiff.lab.benchmarks.command",
    "support": "ecodiff.lab.support.command",
}
