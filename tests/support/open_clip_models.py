"""open_clip, also where torchvision is not installed, and its models with random weights."""

import importlib.machinery
import importlib.util
import sys
import types

import pytest

from rankclip_jax.weights import architecture


def import_open_clip():
    """open_clip, or a skipped test; with an empty torchvision where that is not installed: its models do not use it."""
    if "open_clip" in sys.modules:  # imported for another file's tests
        return sys.modules["open_clip"]
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("open_clip is not installed")
    if importlib.util.find_spec("torchvision") is not None:
        import open_clip

        return open_clip

    class Names(type):
        """Any attribute exists: open_clip's preprocessing takes defaults such as InterpolationMode.BICUBIC."""

        def __getattr__(cls, name):
            if name.startswith("__"):
                raise AttributeError(name)
            return Names(name, (), {})

    class Empty(types.ModuleType):
        __getattr__ = Names.__getattr__

    import torch

    # timm gives these two operators a shape rule, so they must be declared.
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    names = ["", ".transforms", ".transforms.functional", ".ops", ".ops.misc"]
    for name in (f"torchvision{n}" for n in names):
        sys.modules[name] = module = Empty(name)
        module.__path__, module.__spec__ = [], importlib.machinery.ModuleSpec(name, None)
        if "." in name:
            parent, child = name.rsplit(".", 1)
            setattr(sys.modules[parent], child, module)
    try:
        import open_clip
    finally:
        for name in names:
            del sys.modules[f"torchvision{name}"]
    return open_clip


def open_clip_model(open_clip, config):
    """open_clip's model of our ClipConfig `config`; nothing in it is at its initial zeros and ones."""
    import torch

    described = architecture.to_open_clip(config)
    torch.manual_seed(0)
    model = open_clip.CLIP(
        described["embed_dim"], described["vision_cfg"], described["text_cfg"], described["quick_gelu"]
    ).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                value += (0.2 if name.endswith("running_var") else 0.05) * torch.rand_like(value)
        model.logit_scale.fill_(2.5)
    return model
