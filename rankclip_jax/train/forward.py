"""A training batch on its way to embeddings: cut out, augmented, thinned, through the towers."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rankclip_jax.common.packing import Packed
from rankclip_jax.models import CLIP, images
from rankclip_jax.parallel.mesh import batch_axes
from rankclip_jax.train import rules
from rankclip_jax.weights.lora import Adapted


def rows_of(
    batch: dict, step: jax.Array, seed_key: jax.Array, model: CLIP | Adapted, config: ConfigDict, kept: int | None
) -> dict:
    """What the towers take: pictures cut out and augmented, tokens, and the patches that are kept, if not all."""
    side, patches = model.config.vision.image_size, model.config.vision.grid**2
    views_BxVxSxSx3 = images.views(batch, side)
    flat = views_BxVxSxSx3.reshape(-1, side, side, 3)
    key = jax.random.fold_in(seed_key, step)
    pixels = images.augment(key, flat, flip=config.data.flip, jitter=config.data.color_jitter)
    rows = {"image": pixels.reshape(views_BxVxSxSx3.shape), "tokens": batch["tokens"]}
    if kept:  # 0 and 1 are augment's
        patches_NxK = images.draw_patches(jax.random.fold_in(key, 2), len(flat), patches, kept)
        rows["patches"] = patches_NxK.reshape(*views_BxVxSxSx3.shape[:2], -1)
    return rows


def embed_function(
    model: CLIP | Adapted, config: ConfigDict, frozen: dict, batch_stats: dict, kept: int | None
) -> Callable:
    """Returns embed(trained parameters, rows) -> (z_img (b, V, D), z_txt (b, V, D), new batch statistics)."""
    side = model.config.vision.image_size

    def embed(trained, rows):
        tokens, some = rows["tokens"], rows.get("patches")
        (z_img_nxD, z_txt_nxD, _), updated = model.apply(
            {"params": rules.join(trained, frozen), "batch_stats": batch_stats},
            images.normalize(rows["image"].reshape(-1, side, side, 3), config.data.mean, config.data.std),
            tokens if isinstance(tokens, Packed) else tokens.reshape(-1, tokens.shape[-1]),
            train=bool(jax.tree.leaves(trained["visual"])),  # of a frozen tower batch norm's statistics stay too
            patches_BxK=None if some is None else some.reshape(-1, kept),
            mutable=["batch_stats"],
        )
        z_img_bxVxD, z_txt_bxVxD = (z.reshape(len(rows["image"]), -1, z.shape[-1]) for z in (z_img_nxD, z_txt_nxD))
        return z_img_bxVxD, z_txt_bxVxD, updated.get("batch_stats", {})

    return embed


def constrained(tree: Any, mesh: jax.sharding.Mesh | None) -> Any:
    """Rows cut into (parts, B / parts, ...) stay on the devices that hold them."""
    if mesh is None:
        return tree
    parts_sharding = NamedSharding(mesh, PartitionSpec(None, batch_axes(mesh)))
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, parts_sharding), tree)
