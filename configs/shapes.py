"""The built-in demo: drawn scenes, a small residual network, minutes on two CPU cores.

--config configs/shapes.py:objective=clip trains the same model with CLIP's loss alone.
"""

from ml_collections import ConfigDict


def get_config(objective: str = "rankclip") -> ConfigDict:
    """`objective`: of config.loss."""
    return ConfigDict(
        dict(
            batch_size=128,
            epochs=10,
            log_every=20,
            loss=dict(objective=objective),
            model=dict(
                name="RN-tiny",
                image_size=32,
                context_length=24,
                vision=dict(stem="imagenet", layers=(1, 1, 1), width=32),
                text=dict(layers=2),
            ),
            tokenizer=dict(vocab_size=512),
            optim=dict(lr=2e-3, weight_decay=0.05, warmup_steps=50, grad_clip_norm=1.0),
            # No flip: it would turn "left" into "right". Crops keep nearly all, for the same reason.
            data=dict(format="shapes", train=12_800, val=640, crop_scale=(0.9, 1.0)),
            eval=dict(
                every_epochs=2,
                zero_shot=dict(
                    seen=dict(format="shapes", path="seen"),
                    held_out=dict(format="shapes", path="held_out"),
                ),
                retrieval=dict(scenes=dict(format="shapes", path=320)),
                geometry=dict(scenes=dict(format="shapes", path=320)),
                every=dict(retrieval=None, geometry=2),
            ),
        )
    )
