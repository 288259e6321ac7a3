"""The box around every interactive figure: it brings its own colours, so that no page can make it unreadable.

Text and ground are set together. A page that changed one of them alone (the book's theme does so in dark mode) would
print light text on a light ground, or dark on dark.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

# The theme's variables where there are any, else what the browser takes for a page in its own light or dark mode.
STYLE = """
.ecodiff-interactive { max-width: 46rem; margin: 0 auto; font: inherit; text-align: left;
  color: var(--pst-color-text-base, CanvasText); background: var(--pst-color-background, Canvas); }
.ecodiff-interactive input, .ecodiff-interactive select { max-width: 100%; box-sizing: border-box;
  color: inherit; background-color: var(--pst-color-background, Canvas); }
.ecodiff-interactive select option { color: var(--pst-color-text-base, CanvasText);
  background-color: var(--pst-color-background, Canvas); }
.ecodiff-interactive svg text { fill: currentColor; }
"""


def interactive(name: str, label: str, body: str, style: str, script: Path, constants: dict):
    """An object that Jupyter, Colab and the book display: `body` (HTML) in a box, moved by a script.

    ``name`` is the class of the box, by which the script finds it; ``label`` says to a screen reader what it is.
    In the text of ``script`` the word CONSTANTS becomes ``constants`` as JSON.
    """
    from IPython.display import HTML

    code = script.read_text(encoding="utf-8").replace("CONSTANTS", json.dumps(constants))
    return HTML(f"""
<div class="ecodiff-interactive {name}" role="group" aria-label="{escape(label)}">
<style>{STYLE}{style}</style>
{body}
<script>{code}</script>
</div>""")
