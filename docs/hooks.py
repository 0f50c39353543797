"""What mkdocs does to a page first: a link to a file of the checkout that is no page becomes the file's name."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for each page (https://www.mkdocs.org/dev-guide/plugins/#on_page_markdown)."""
    folder = (DOCS / page.file.src_uri).parent

    def plain(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        return f"`{match[1].strip('`')}`" if target.exists() and not target.is_relative_to(DOCS) else match[0]

    return re.sub(r"\[([^\]\n]+)\]\(([^)#\s]+)\)", plain, markdown)
