"""When does ranking help? Five questions in a world whose truth is known (docs/study_plan.md).

python -m rankclip_jax.study --config configs/study_ranking.py --config.study.processes=2

Scenes with captions that say more or less (input_pipeline/graded.py). Where nothing else is asked: 16,384 pairs, a
fifth of them mismatched and a twentieth nearly repeated, 2,048 steps.
"""

import math

from ml_collections import ConfigDict

SEEDS = 16
RANK = "rankclip"
OBJECTIVES = {
    "clip": dict(objective="clip"),
    "rankclip": dict(objective=RANK),
    "lists_64": dict(objective=RANK, list_size=64),
    "lists_16": dict(objective=RANK, list_size=16),
    "top_10": dict(objective=RANK, top_k=10),
    "in_modal": dict(objective=RANK, lambda_cross=0.0),
    "cross_modal": dict(objective=RANK, lambda_in=0.0),
    "weight_4x": dict(objective=RANK, lambda_in=1 / 4, lambda_cross=1 / 4),
    "weight_16x": dict(objective=RANK, lambda_in=1.0, lambda_cross=1.0),
    "constant": dict(objective=RANK, schedule="constant"),
    "released": dict(objective=RANK, form="released"),
}
BOTH = ("clip", "rankclip")
STEPS, BATCH = 2048, 128


def _pairs(count: int) -> dict:
    epochs = STEPS * BATCH // count
    return dict(data=dict(train=f"graded:{count}"), epochs=epochs, eval=dict(every_epochs=epochs), objectives=BOTH)


CONDITIONS = {
    "base": dict(objectives=tuple(name for name in OBJECTIVES if name != "released")),
    "clean": dict(study=dict(mismatched=0.0), objectives=BOTH),
    "noisy": dict(study=dict(mismatched=0.4), objectives=BOTH),
    "pairs_1k": _pairs(1024),
    "pairs_4k": _pairs(4096),
    "clamp": dict(model=dict(logit_scale=math.log(100)), objectives=(*BOTH, "released")),
}


def _against_clip(*names: str, condition: str = "base") -> dict:
    return {f"{name} - clip": f"{condition}/{name} - {condition}/clip" for name in names}


QUESTIONS = {
    "noise": dict(
        metric="zero_shot/seen",
        contrasts={
            "rankclip - clip, 0 %": "clean/rankclip - clean/clip",
            "rankclip - clip, 20 %": "base/rankclip - base/clip",
            "rankclip - clip, 40 %": "noisy/rankclip - noisy/clip",
            "40 % against 0 %": "noisy/rankclip - noisy/clip - clean/rankclip + clean/clip",
        },
    ),
    "data": dict(
        metric="zero_shot/seen",
        contrasts={
            "rankclip - clip, 1,024 pairs": "pairs_1k/rankclip - pairs_1k/clip",
            "rankclip - clip, 4,096 pairs": "pairs_4k/rankclip - pairs_4k/clip",
            "1,024 against 16,384": "pairs_1k/rankclip - pairs_1k/clip - base/rankclip + base/clip",
        },
    ),
    "lists": dict(
        metric="retrieval/ndcg10_image_to_text",
        contrasts={
            "whole batch - clip": "base/rankclip - base/clip",
            "groups of 64 - whole batch": "base/lists_64 - base/rankclip",
            "groups of 16 - whole batch": "base/lists_16 - base/rankclip",
            "top 10 - whole batch": "base/top_10 - base/rankclip",
        },
    ),
    "terms": dict(
        metric="retrieval/ndcg10_image_to_text",
        contrasts=_against_clip("in_modal", "cross_modal", "weight_4x", "weight_16x", "constant"),
    ),
    "released": dict(
        metric="zero_shot/seen",
        contrasts=_against_clip("rankclip", "released", condition="clamp")
        | {"released - rankclip": "clamp/released - clamp/rankclip"},
    ),
}


def get_config() -> ConfigDict:
    """The whole study."""
    return ConfigDict(
        dict(
            batch_size=BATCH,
            epochs=16,
            model=dict(
                name="ViT-tiny",
                image_size=32,
                context_length=24,
                vision=dict(patch_size=8, width=64, layers=2, heads=2),
                text=dict(width=64, layers=1, heads=2),
            ),
            tokenizer=dict(vocab_size=400),
            optim=dict(lr=5e-4, weight_decay=0.05, warmup_steps=50, grad_clip_norm=1.0),
            data=dict(format="shapes", train="graded:16384", val="stated:512", crop_scale=(0.9, 1.0)),
            eval=dict(
                every_epochs=16,
                zero_shot=dict(
                    seen=dict(format="shapes", path="seen:1680"),
                    held_out=dict(format="shapes", path="held_out:800"),
                ),
            ),
            study=dict(
                objectives=OBJECTIVES,
                conditions=CONDITIONS,
                questions=QUESTIONS,
                seeds=SEEDS,
                mismatched=0.2,
                duplicates=0.05,
                select_on=("seen",),
                pairs=512,
            ),
        )
    )
