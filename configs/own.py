"""Your own pairs of images and captions: `rankclip train mine.csv --val heldout.csv --labels heldout.csv:group`.

What is None is settled when the run starts, by the number of pairs and the devices (rankclip_jax/train/resolve.py).
"""

from ml_collections import ConfigDict


def get_config(objective: str = "rankclip") -> ConfigDict:
    """`objective`: of config.loss."""
    return ConfigDict(
        dict(
            batch_size=None,
            epochs=None,
            log_every=None,
            loss=dict(objective=objective, schedule=None),
            model=dict(name=None),
            optim=dict(lr=None, weight_decay=0.1, warmup_steps=None, grad_clip_norm=1.0),
            # No flip: it would make captions of "left" and of writing wrong.
            data=dict(format=None, crop_scale=(0.6, 1.0)),
            eval=dict(every_epochs=None, every=dict(retrieval=0, geometry=None)),
        )
    )
