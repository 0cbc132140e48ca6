"""Writes the project's public address where Colab needs it: python -m notebooks.address https://github.com/USER/REPO

That is the constant REPO of the notebook's first cell, and a badge under the title of the notebook and of README.md.
"""

import re
import sys
from pathlib import Path

import nbformat

REPO = Path(__file__).parents[1]
NOTEBOOK, README = Path("notebooks/rankclip_colab.ipynb"), Path("README.md")
_BADGE = re.compile(r"\n\n\[!\[Open in Colab\].*")


def write(address: str, folder: Path = REPO) -> None:
    """Replaces the address in the two files of `folder`; "" removes it.

    Raises:
      ValueError: not https://github.com/USER/REPO, which is what Colab opens.
    """
    if address and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address):
        raise ValueError(f"{address!r}. Expected https://github.com/USER/REPO")
    colab = "https://colab.research.google.com"
    page = f"{address.replace('https://github.com', f'{colab}/github')}/blob/main/{NOTEBOOK}"
    badge = f"\n\n[![Open in Colab]({colab}/assets/colab-badge.svg)]({page})" if address else ""

    def badged(text):
        title, rest = _BADGE.sub("", text).split("\n", 1)
        return title + badge + "\n" + rest

    notebook = nbformat.read(folder / NOTEBOOK, as_version=4)
    title, first = notebook.cells[:2]
    title.source = badged(title.source)
    first.source = re.sub(r'(?m)^REPO = ".*"$', f'REPO = "{address}"', first.source)
    nbformat.write(notebook, folder / NOTEBOOK)
    (folder / README).write_text(badged((folder / README).read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(sys.argv[1].removesuffix("/").removesuffix(".git"))
