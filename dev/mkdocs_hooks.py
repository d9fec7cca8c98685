"""Adds the documents beside docs/ to the site, and checks links to files of the repository.

In the repository each Markdown file links to others by relative path. In the site all pages are in
one folder, and files that are not pages (configs, sources) are missing.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
BESIDE_DOCS = ("README.md", "MODEL_ZOO.md", "CONTRIBUTING.md", "CHANGELOG.md")
# MkDocs would use README.md as the index, but docs/ has an index.
PAGE_NAMES = {"README.md": "overview.md"}

_LINK = re.compile(r"\[([^\]]*)\]\((?!https?:)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    for name in BESIDE_DOCS:
        page = PAGE_NAMES.get(name, name)
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    source = Path(page.file.abs_src_path)

    def link(match: "re.Match[str]") -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        path = (source.parent / target).resolve()
        if not path.exists():
            raise PluginError(f"{source.name}: the link to {target} leads nowhere")
        if path.parent == ROOT / "docs":
            return f"[{text}]({path.name}{anchor})"
        if path.parent == ROOT and path.name in BESIDE_DOCS:
            return f"[{text}]({PAGE_NAMES.get(path.name, path.name)}{anchor})"
        return text  # the site does not have this file of the repository

    return _LINK.sub(link, markdown)
