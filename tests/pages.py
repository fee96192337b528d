"""The code that README and the pages of docs/ show."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")))


def blocks(page: str, language: str) -> list[str]:
    """The page's code blocks in a language, in their order."""
    return _blocks((ROOT / page).read_text(encoding="utf-8"), language)


def sections(page: str, language: str) -> dict[str, list[str]]:
    """The same by the heading that they stand under, where there are any."""
    _, *parts = re.split(r"^##+ (.*)$", (ROOT / page).read_text(encoding="utf-8"), flags=re.M)
    found = {heading: _blocks(text, language) for heading, text in zip(parts[::2], parts[1::2], strict=True)}
    return {heading: code for heading, code in found.items() if code}


def _blocks(text: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.S | re.M)
    return ["\n".join(line.removeprefix(indent) for line in code.splitlines()) for indent, code in found]
