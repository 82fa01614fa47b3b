"""Formulas of the pages: TeX between dollar signs becomes MathML while the site is built, so that no script renders it.

`pymdownx.arithmatex` marks the formulas, `latex2mathml` translates them, and `tidied` mends what browsers would show
differently from TeX. The same source is rendered by GitHub.
"""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<tex>.*?)\\[)\]]</(?P=tag)>(?P<after>[^\s<]*)', re.DOTALL
)
NAMESPACE = "{http://www.w3.org/1998/Math/MathML}"
SPELLINGS = ((r"\\arg\s*\\(max|min)", r"\\arg\1"), (r"\\operatorname\*", r"\\operatorname"), (r"\\tfrac", r"\\frac"))
"""What GitHub knows and latex2mathml does not, and what it knows in its place."""
OPERATORS = {sign: sign for sign in "±:;⌈⌉⌊⌋⟨⟩…"} | {"~": "\u223c", "\u29f5": "\u2216"}
"""Signs that latex2mathml writes as identifiers -> the operators that they are."""
SCRIPTS = ("msub", "msup", "msubsup", "munder", "munderover")
LIMITS = ("max", "min", "arg max", "arg min", "sup", "inf", "lim")
BARS, CLOSING, SIGNS = "|‖∥", ")]}⟩⌉⌋|‖!\u2032", "\u2212+±"
MARKS = "^¯~˙¨→⃗"
THIN = "0.167em"


def rendered(page: str) -> str:
    """A page's HTML with its formulas in MathML.

    Raises:
        ValueError: A formula cannot be translated, which fails the build.
    """
    page = FORMULA.sub(_element, page)
    if "$$" in re.sub(r"<(code|pre)\b.*?</\1>|\balttext=\".*?\"", "", page, flags=re.DOTALL):
        raise ValueError("text between $$ is no formula: put empty lines around it, and indent it by 4 spaces in lists")
    return page


def _element(found: re.Match[str]) -> str:
    """The MathML of a formula; punctuation that follows stays on its line."""
    block, after = found["tag"] == "div", found["after"]
    formula = mathml(html.unescape(found["tex"]).strip(), block=block)
    if block:
        return f'<div class="formula">{formula}</div>{after}'
    return f'<span class="formula">{formula}{after}</span>' if after else formula


def mathml(tex: str, *, block: bool = False) -> str:
    """A formula in MathML, with its source as the text for readers who do not see it.

    Args:
        tex: The formula, without dollar signs.
        block: Whether it stands on lines of its own.

    Raises:
        ValueError: It cannot be translated.
    """
    braces = re.sub(r"\\[{}\\]", "", tex)
    if braces.count("{") != braces.count("}"):
        raise ValueError(f"the formula {tex!r} has unequal numbers of opening and closing braces")
    source = tex
    for written, known in SPELLINGS:
        source = re.sub(written, known, source)
    try:
        text = convert(source, display="block" if block else "inline")
    except Exception as error:  # latex2mathml has an error of its own for every mistake
        raise ValueError(f"the formula {tex!r} is not understood: {type(error).__name__}") from error
    if unknown := re.search(r">(\\[A-Za-z]+)<", text):
        raise ValueError(f"the formula {tex!r} has {unknown[1]}, which latex2mathml does not know")
    math = ElementTree.fromstring(text)
    tidied(math, block=block)
    math.set("alttext", tex)
    ElementTree.register_namespace("", NAMESPACE.strip("{}"))
    return ElementTree.tostring(math, encoding="unicode")


def tidied(element: ElementTree.Element, *, block: bool = False) -> None:
    """Correct, in place, what browsers would show differently from TeX.

    Args:
        element: The formula or a part of it.
        block: Whether limits stand below and not beside their operator.
    """
    for child in element:
        tidied(child, block=block)
        name, text = child.tag.removeprefix(NAMESPACE), child.text or ""
        if name == "mi" and text in OPERATORS:
            child.tag, child.text = f"{NAMESPACE}mo", OPERATORS[text]
            child.set("stretchy", "false")
        elif name == "mo" and text in BARS and child.get("fence") != "true":  # with fence, of \left and \right
            child.set("stretchy", "false")
        elif name == "mover" and child[1].text in list(MARKS):
            child.set("accent", "true")
        elif name == "mspace" and child.get("width") == "negativethinmathspace":
            child.set("width", f"-{THIN}")
        elif name == "msub" and block and child[0].text in LIMITS:
            child.tag = f"{NAMESPACE}munder"
        if child.get("mathvariant") == "double-struck" and text == "1":
            child.text = "\N{MATHEMATICAL DOUBLE-STRUCK DIGIT ONE}"
        if child.get("mathvariant", "normal") != "normal" and child.attrib.pop("mathvariant").startswith("bold"):
            child.set("style", "font-weight: bold")  # the attribute is no more
    _join_upright_letters(element)
    _space_functions(element)


def _join_upright_letters(row: ElementTree.Element) -> None:
    """Make one name of the letters of `\\mathrm{...}`."""
    letters = [child for child in row if child.get("mathvariant") == "normal" and child.tag == f"{NAMESPACE}mi"]
    if row.tag == f"{NAMESPACE}mrow" and 1 < len(letters) == len(row):
        letters[0].text = "".join(letter.text or "" for letter in letters)
        for letter in letters[1:]:
            row.remove(letter)
        del letters[0].attrib["mathvariant"]


def _space_functions(row: ElementTree.Element) -> None:
    """Set names of functions, such as log, off from what stands beside them, except parentheses and operators.

    A sign that follows an operator belongs to what comes after it, as in = -1.
    """
    if row.tag.removeprefix(NAMESPACE) not in ("mrow", "mtd"):
        return
    children = list(row)
    for left, right in reversed(list(pairwise(children))):
        if (_is_function(left) or _is_function(right)) and not (_is_operator(left) or _is_operator(right)):
            space = ElementTree.Element(f"{NAMESPACE}mspace", {"width": THIN})
            row.insert(children.index(right), space)
        if _is_operator(left) and (left.text or ")") not in CLOSING and (right.text or "?") in SIGNS:
            right.set("form", "prefix")


def _is_function(element: ElementTree.Element) -> bool:
    """Whether it is a name of several letters, perhaps with a subscript or superscript."""
    while len(element) == 1 or element.tag.removeprefix(NAMESPACE) in SCRIPTS:
        element = element[0]
    named = re.fullmatch(r"[A-Za-z ]{2,}", element.text or "")
    return element.tag in (f"{NAMESPACE}mi", f"{NAMESPACE}mo") and bool(named)


def _is_operator(element: ElementTree.Element) -> bool:
    """Whether the browser sets it off by itself, or TeX would not set a function's name off from it."""
    return element.tag in (f"{NAMESPACE}mo", f"{NAMESPACE}mspace") and not _is_function(element)
