"""Check that every link inside a built site leads to a file, and to a place in it that exists.

Usage: python .ci/check_site.py FOLDER
"""

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links and the named places of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = {"", "top"}
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.places.update(value for name in ("id", "name") if (value := found.get(name)))
        self.links += [value for name in ("href", "src") if (value := found.get(name))]


def main(folder: str) -> None:
    root = Path(folder).resolve()
    pages = {path: Page(path) for path in sorted(root.rglob("*.html"))}
    broken, checked = [], 0
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            checked += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                broken.append(f"{path.relative_to(root)}: {link} leads to no file")
            elif target in pages and unquote(parts.fragment) not in pages[target].places:
                broken.append(f"{path.relative_to(root)}: {link} leads to no such place")
    if broken:
        sys.exit("\n".join(sorted(set(broken))))
    print(f"{len(pages)} pages, {checked} links inside the site, all of them lead somewhere")


if __name__ == "__main__":
    main(sys.argv[1])
