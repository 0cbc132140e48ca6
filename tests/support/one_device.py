"""Trainings and evaluations in this process on few of its eight devices: on one, as on most users' machines."""


def on_one_device(monkeypatch) -> None:
    """From now on. Their programs compile in two thirds of the time of those for eight."""
    on_devices(monkeypatch, 1)


def on_devices(monkeypatch, count: int) -> None:
    """As on_one_device, on the first `count`."""
    import jax

    from rankclip_jax.parallel import mesh
    from rankclip_jax.train import resolve, session

    def make_mesh(axes, devices=None):
        return mesh.make_mesh(axes, devices or jax.devices()[:count])

    for module in session, resolve:
        monkeypatch.setattr(module, "make_mesh", make_mesh)
