"""The public address stands in the notebook's first cell and in two badges, and nowhere else."""

import shutil

import nbformat
import pytest

from notebooks import address


def test_an_address_is_written_replaced_and_removed(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name in (address.NOTEBOOK, address.README):
        shutil.copy(address.REPO / name, tmp_path / name)
    address.write("", tmp_path)
    files = [tmp_path / address.NOTEBOOK, tmp_path / address.README]
    without = [file.read_text() for file in files]
    for user in ("ada", "grace"):
        address.write(f"https://github.com/{user}/rank", tmp_path)
        title, first = nbformat.read(files[0], as_version=4).cells[:2]
        page = f"(https://colab.research.google.com/github/{user}/rank/blob/main/notebooks/rankclip_colab.ipynb)"
        assert title.source.split("\n")[2].endswith(page)
        assert f'\nREPO = "https://github.com/{user}/rank"\n' in first.source
        readme = files[1].read_text()
        assert readme.split("\n")[2].endswith(page) and readme.count("Open in Colab") == 1
    address.write("", tmp_path)
    assert [file.read_text() for file in files] == without
    with pytest.raises(ValueError, match="https://github.com/USER/REPO"):
        address.write("https://gitlab.com/ada/rank", tmp_path)
