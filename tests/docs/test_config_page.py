"""docs/config.md is what the comments of config_keys.py say, and says something about every key."""

import importlib.util
from pathlib import Path

from rankclip_jax.common.trees import flatten
from rankclip_jax.config import fields
from rankclip_jax.config import keys as config_keys

DOCS = Path(__file__).parents[2] / "docs"
spec = importlib.util.spec_from_file_location("config_page", DOCS / "config_page.py")
config_page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(config_page)


def test_the_page_is_that_of_the_code():
    again = "run: python docs/config_page.py > docs/config.md"
    assert (DOCS / "config.md").read_text() == config_page.page(), again
    always = [f"`{key}`" for key in config_keys.MAY_CHANGE if key not in ("epochs", "steps")]  # which it names apart
    assert f"may change only these keys:\n{', '.join(always)}." in config_page.page()


def test_every_key_is_there_with_its_default_and_a_comment():
    rows = config_page.tables(config_page.SOURCE)
    documented = {key: default for key, default, _ in rows["KEYS"] if default is not None}
    keys = flatten(config_keys.default_config().to_dict())
    assert {key for key, default in documented.items() if default != "{}"} == keys.keys()
    for key in keys:
        assert eval(documented[key]) == keys[key], key
    tables = {name: {key: default for key, default, _ in rows[name]} for name in config_page.SETS}
    assert tables["MIXTURE_PART"].keys() == fields.MIXTURE_PART.keys()
    assert tables["ZERO_SHOT_SET"].keys() == fields.ZERO_SHOT_SET.keys()
    assert (tables["ZERO_SHOT_SET"] | tables["LINEAR_PROBE_SET"]).keys() == fields.LINEAR_PROBE_SET.keys()
    assert (tables["CAPTIONED_SET"] | tables["GEOMETRY_SET"]).keys() == fields.GEOMETRY_SET.keys()
    silent = [key for table in rows.values() for key, default, comment in table if default is not None and not comment]
    assert not silent, f"a comment beside each of {silent} in rankclip_jax/config, please"
