"""A hook of mkdocs: equations become MathML, which browsers draw without a script from elsewhere."""

import html
import re

from latex2mathml.converter import convert

EQUATION = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)


def _mathml(match: re.Match) -> str:
    "One equation as MathML, in the line or displayed."
    display = "block" if match["tag"] == "div" else "inline"
    return convert(html.unescape(match["tex"]), display=display)


def on_page_content(
    content: str,  # HTML of a page
    **_,  # page, config and files, which we do not need
) -> str:
    "HTML of a page with its equations as MathML."
    return EQUATION.sub(_mathml, content)
