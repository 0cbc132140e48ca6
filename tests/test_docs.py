"""What the README and docs name exists."""

import re
from pathlib import Path

import pytest

from rankclip_jax import config as configs

REPO = Path(__file__).parents[1]
PAGES = [REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))]
ROOTS = "configs|rankclip_jax|input_pipeline|benchmarks|docs|tests"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_commands_and_keys_exist(page):
    text = page.read_text()
    for name in re.findall(rf"\b((?:{ROOTS})/[\w./-]+\.(?:py|md|png|txt))", text):
        assert (REPO / name).exists(), name
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / target).exists(), target
    for module in re.findall(r"python -m ((?:rankclip_jax|input_pipeline|benchmarks)[\w.]*)", text):
        path = REPO / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for key in set(re.findall(r"--config\.([\w.]+)=", text)) - {"key"}:  # --config.key=value stands for any
        value = configs.default_config()
        for part in key.split("."):
            assert part in value, key
            value = value[part]
