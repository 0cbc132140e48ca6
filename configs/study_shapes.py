"""Does ranking help? Every objective over seeds on drawn scenes, sized for 2 CPU cores.

python -m rankclip_jax.study --config configs/study_shapes.py
"""

from ml_collections import ConfigDict

# Weights as published (rankclip_jax/config/keys.py says by whom).
OBJECTIVES = {
    "clip": dict(objective="clip"),
    "rankclip": dict(objective="rankclip"),
    "rankclip_in": dict(objective="rankclip", lambda_cross=0.0),
    "rankclip_cross": dict(objective="rankclip", lambda_in=0.0),
    "rankclip_v2": dict(objective="rankclip", schedule="constant", decay="log"),
    "rankclip_top10": dict(objective="rankclip", top_k=10),
    "rankclip_released": dict(objective="rankclip", form="released"),
    "rank_alone": dict(objective="rank", schedule="constant"),
    "cyclip": dict(objective="cyclip"),
    "siglip": dict(objective="siglip"),
    "rankclip_8x": dict(objective="rankclip", lambda_in=0.5, lambda_cross=0.5),
}


def get_config() -> ConfigDict:
    """The study; tests/study/test_study.py runs it at a smaller size."""
    return ConfigDict(
        dict(
            batch_size=64,
            epochs=4,
            model=dict(
                name="ViT-tiny",
                image_size=32,
                context_length=24,
                vision=dict(patch_size=8, width=64, layers=2, heads=2),
                text=dict(width=64, layers=1, heads=2),
            ),
            tokenizer=dict(vocab_size=400),
            optim=dict(lr=2e-3, weight_decay=0.05, warmup_steps=10, grad_clip_norm=1.0),
            data=dict(format="shapes", train=2_048, val=320, crop_scale=(0.9, 1.0)),
            eval=dict(
                every_epochs=2,
                zero_shot=dict(
                    seen=dict(format="shapes", path="seen:1680"),
                    held_out=dict(format="shapes", path="held_out:800"),
                ),
            ),
            study=dict(
                objectives=OBJECTIVES,
                seeds=3,
                more_seeds=dict(clip=5, rankclip=5),
                lrs=(1e-3, 3e-3),
                select_on=("seen",),
                pairs=320,
            ),
        )
    )
