"""The kernels that are launched, on devices that have none."""

import functools

from hf_sketch.model import gradient_pass


def note_launches(monkeypatch, kind):
    """Launch kernels wherever tensors are; return the names of those of a class."""
    names, launch = [], kind._launch

    @functools.wraps(launch)
    def noted(self, name, *args, **kwargs):
        names.append(name)
        launch(self, name, *args, **kwargs)

    monkeypatch.setattr(kind, "_launch", noted)
    monkeypatch.setattr(gradient_pass, "can_launch", lambda device: True)
    return names
