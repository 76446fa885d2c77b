"""Makes a site of pages that are written for the repository: their links lead to files, wherever these are.

mkdocs calls this (`hooks` in mkdocs.yml). README.md becomes the first page. A link out of docs/ leads to a page that shows the
file, or the files of the folder, so that the site is whole without a network. A link to nothing is a warning, which ends
`mkdocs build --strict`, as does an anchor that is not there.
"""

from __future__ import annotations

import logging
import posixpath
import re
import subprocess
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")
FENCE = re.compile(r"^( *)(```+|~~~+).*?^\1\2 *$", re.DOTALL | re.MULTILINE)
LANGUAGES = {"py": "python", "sh": "bash", "sbatch": "bash", "yaml": "yaml", "yml": "yaml", "json": "json", "md": "markdown"}
HOME = "index.md"
LONGEST = 60_000  # characters of a file that are shown

log = logging.getLogger("mkdocs.hooks.site")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the first page, and a page for everything outside docs/ that a page links to."""
    files.append(File.generated(config, HOME, content=(ROOT / "README.md").read_text(encoding="utf-8")))
    shown = set()
    for page in [file for file in files if file.is_documentation_page()]:
        for _, target in LINK.findall(FENCE.sub("", page.content_string)):
            place = _place(page.src_uri, target.partition("#")[0])
            if place is not None and place != "README.md" and _outside(place) and (ROOT / place).exists():
                shown.add(place)
    for place in sorted(shown):
        content = f"---\nsearch: {{exclude: true}}\n---\n{_shown(ROOT / place, place)}"
        files.append(File.generated(config, _page_of(place), content=content, inclusion=InclusionLevel.NOT_IN_NAV))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links where the site has what they lead to in the repository."""
    source = page.file.src_uri
    if source.startswith("repository/"):
        return markdown

    def moved(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, mark, anchor = target.partition("#")
        place = _place(source, path)
        if place is None:
            return match.group()
        if not (ROOT / place).exists():
            log.warning(f"{source}: links to {target}, and the repository has no {place}")
        there = _page_of(place) if _outside(place) else place.removeprefix("docs/")
        return f"{text}({posixpath.relpath(there, posixpath.dirname(source) or '.')}{mark}{anchor})"

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        parts += [LINK.sub(moved, markdown[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, LINK.sub(moved, markdown[end:])])


def _place(source: str, path: str) -> str | None:
    """The path in the repository that a link of a page means; None for another site, or a place of the page itself."""
    if not path or re.match(r"[a-z]+:|/", path):
        return None
    folder = "" if source == HOME else posixpath.join("docs", posixpath.dirname(source))
    return posixpath.normpath(posixpath.join(folder, path))


def _outside(place: str) -> bool:
    return not place.startswith("docs/") or place.endswith(".py")


def _page_of(place: str) -> str:
    return HOME if place == "README.md" else f"repository/{place}.md"


def _shown(path: Path, place: str) -> str:
    """A page with a file, or with the files of a folder that belong to the repository."""
    if path.is_file():
        return f"# `{place}`\n\n{_block(path)}"
    listed = subprocess.run(["git", "ls-files", place], cwd=ROOT, capture_output=True, text=True).stdout.split()
    names = listed or [file.relative_to(ROOT).as_posix() for file in sorted(path.rglob("*")) if file.is_file()]
    return f"# `{place}`\n\n" + "\n".join(f"## `{posixpath.relpath(name, place)}`\n\n{_block(ROOT / name)}" for name in names)


def _block(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return "not a text\n"
    more = "" if len(text) <= LONGEST else f"\nThe first {LONGEST:,} of {len(text):,} characters.\n"
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}{LANGUAGES.get(path.suffix[1:], 'text')}\n{text[:LONGEST].rstrip()}\n{fence}\n{more}"
