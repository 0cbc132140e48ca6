"""Does ranking help on real pictures with mismatched captions, or with few pairs? (docs/study_plan.md)

python -m rankclip_jax.study --config configs/study_cifar10_noise.py:dir=PATH, the folder that configs/cifar10.py
describes. As configs/study_ranking.py, on captioned CIFAR-10 pictures.
"""

from ml_collections import ConfigDict

SEEDS = 16
STEPS, BATCH = 2048, 128


def _pairs(count: int) -> dict:
    epochs = STEPS * BATCH // count
    return dict(study=dict(limit=count), epochs=epochs, eval=dict(every_epochs=epochs))


CONDITIONS = {
    "base": {},
    "clean": dict(study=dict(mismatched=0.0)),
    "noisy": dict(study=dict(mismatched=0.4)),
    "pairs_1k": _pairs(1024),
    "pairs_4k": _pairs(4096),
}

QUESTIONS = {
    "noise": dict(
        metric="zero_shot/cifar10",
        contrasts={
            "rankclip - clip, 0 %": "clean/rankclip - clean/clip",
            "rankclip - clip, 20 %": "base/rankclip - base/clip",
            "rankclip - clip, 40 %": "noisy/rankclip - noisy/clip",
            "40 % against 0 %": "noisy/rankclip - noisy/clip - clean/rankclip + clean/clip",
        },
    ),
    "data": dict(
        metric="zero_shot/cifar10",
        contrasts={
            "rankclip - clip, 1,024 pairs": "pairs_1k/rankclip - pairs_1k/clip",
            "rankclip - clip, 4,096 pairs": "pairs_4k/rankclip - pairs_4k/clip",
            "1,024 against 16,384": "pairs_1k/rankclip - pairs_1k/clip - base/rankclip + base/clip",
        },
    ),
}


def get_config(dir: str = "data/cifar10") -> ConfigDict:
    """`dir`: the folder that configs/cifar10.py describes."""
    return ConfigDict(
        dict(
            batch_size=BATCH,
            epochs=16,
            model=dict(
                name="ViT-tiny",
                image_size=32,
                context_length=16,
                vision=dict(patch_size=8, width=64, layers=2, heads=2),
                text=dict(width=64, layers=1, heads=2),
            ),
            tokenizer=dict(vocab_size=400),
            optim=dict(lr=1e-3, weight_decay=0.05, warmup_steps=50, grad_clip_norm=1.0),
            data=dict(
                format="csv",
                train=f"{dir}/train.csv",
                val=f"{dir}/val.csv",
                hint="name the folder that configs/cifar10.py describes: "
                "--config configs/study_cifar10_noise.py:dir=FOLDER",
                crop_scale=(0.5, 1.0),
                flip=True,
                canvas=32,
            ),
            eval=dict(
                every_epochs=16,
                zero_shot=dict(
                    cifar10=dict(
                        path=f"{dir}/labels.csv",
                        classes=f"{dir}/classes.json",
                        templates=f"{dir}/templates.json",
                    )
                ),
            ),
            study=dict(
                objectives=dict(clip=dict(objective="clip"), rankclip=dict(objective="rankclip")),
                conditions=CONDITIONS,
                questions=QUESTIONS,
                seeds=SEEDS,
                mismatched=0.2,
                duplicates=0.05,
                limit=16_384,
                pairs=512,
            ),
        )
    )
