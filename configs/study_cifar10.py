"""Does ranking help? Every objective over seeds on captioned CIFAR-10 pictures, sized for 2 CPU cores.

python -m rankclip_jax.study --config configs/study_cifar10.py:dir=PATH, the folder that configs/cifar10.py describes
"""

from ml_collections import ConfigDict

# As in configs/study_shapes.py, without the heavier weights.
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
}


def get_config(dir: str = "data/cifar10") -> ConfigDict:
    """`dir`: the folder that configs/cifar10.py describes."""
    return ConfigDict(
        dict(
            batch_size=64,
            epochs=4,
            model=dict(
                name="ViT-tiny",
                image_size=32,
                context_length=16,
                vision=dict(patch_size=8, width=64, layers=2, heads=2),
                text=dict(width=64, layers=1, heads=2),
            ),
            tokenizer=dict(vocab_size=400),
            optim=dict(lr=2e-3, weight_decay=0.1, warmup_steps=10, grad_clip_norm=1.0),
            data=dict(
                format="csv",
                train=f"{dir}/train.csv",
                val=f"{dir}/val.csv",
                hint="name the folder that configs/cifar10.py describes: --config configs/study_cifar10.py:dir=FOLDER",
                crop_scale=(0.5, 1.0),
                flip=True,
                canvas=32,
            ),
            eval=dict(
                every_epochs=2,
                zero_shot=dict(
                    cifar10=dict(
                        path=f"{dir}/labels.csv",
                        classes=f"{dir}/classes.json",
                        templates=f"{dir}/templates.json",
                    )
                ),
            ),
            study=dict(
                objectives=OBJECTIVES,
                seeds=3,
                more_seeds=dict(clip=5, rankclip=5),
                lrs=(1e-3, 3e-3),
                limit=2_048,
                pairs=320,
            ),
        )
    )
