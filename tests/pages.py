"""The code that README and the pages of docs/ show."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")))


def blocks(page: str, language: str) -> list[str]:
    """The page's code blocks in a language, in their order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", text, re.S | re.M)
    return ["\n".join(line.removeprefix(indent) for line in code.splitlines()) for indent, code in found]
