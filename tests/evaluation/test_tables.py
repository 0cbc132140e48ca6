from rankclip_jax.evaluation import tables


def test_every_kind_of_result_has_its_table():
    numbers = {"image_to_text_r1": 0.25, "text_to_image_r1": 0.5}
    results = {kind: {"held_out": numbers | {"n": 8}} for kind in tables._TITLES} | {"missing": {"x/y": "no file"}}
    said = tables.text(results)
    for title in tables._TITLES.values():
        assert f"{title} " in said or f"{title}\n" in said
    assert tables.text({"retrieval": results["retrieval"]}).split()[:5] == ["retrieval", "i2t", "R@1", "t2i", "R@1"]
    assert said.endswith("missing: x/y: no file\n")
