"""The random number generators of a job as a part of its state."""

from __future__ import annotations

import random
import struct
import sys
import warnings
from types import ModuleType
from typing import Any

import torch

from strandline.errors import StrandlineWarning

__all__ = ["RngState"]


def _accelerator() -> tuple[str, ModuleType] | None:
    """The accelerator that this process uses already, and its module; None if it uses none.

    An accelerator that nobody has used yet has no state worth saving, and asking for it would
    initialise it.
    """
    for name in ("cuda", "xpu"):
        module = getattr(torch, name, None)
        if module is not None and module.is_available() and module.is_initialized():
            return name, module
    if torch.backends.mps.is_available():
        return "mps", torch.mps
    return None


def _accelerator_states() -> list[tuple[str, int, bytes]]:
    found = _accelerator()
    if found is None:
        return []
    name, module = found
    states = module.get_rng_state_all() if hasattr(module, "get_rng_state_all") else None
    if states is None:
        states = [module.get_rng_state()]
    return [(name, i, state.numpy().tobytes()) for i, state in enumerate(states)]


def _set_accelerator_states(states: list[tuple[str, int, bytes]]) -> None:
    available = {"cuda": torch.cuda, "xpu": getattr(torch, "xpu", None), "mps": torch.mps}
    skipped = []
    for name, index, data in states:
        module = available.get(name)
        devices = module.device_count() if module is not None and module.is_available() else 0
        if module is None or index >= devices:
            skipped.append(f"{name}:{index}")
            continue
        state = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if name == "mps":
            module.set_rng_state(state)
        else:
            module.set_rng_state(state, index)
    if skipped:
        warnings.warn(
            f"the checkpoint holds the random state of {', '.join(skipped)}, which this machine "
            "does not have: random numbers there will not continue as they would have",
            StrandlineWarning,
            stacklevel=2,
        )


def _python_state() -> dict[str, Any]:
    version, words, gauss_next = random.getstate()
    return {
        "version": version,
        "words": struct.pack(f"<{len(words)}I", *words),
        "gauss_next": gauss_next,
    }


def _set_python_state(state: dict[str, Any]) -> None:
    words = struct.unpack(f"<{len(state['words']) // 4}I", state["words"])
    random.setstate((state["version"], words, state["gauss_next"]))


def _numpy_state() -> dict[str, Any] | None:
    # If nobody has imported it, nobody draws from it, and there is nothing to save.
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    state: dict[str, Any] = numpy.random.get_state(legacy=False)
    if "key" in state["state"]:  # The Mersenne Twister, which is the default.
        key = state["state"]["key"].astype("<u4").tobytes()
        state = {**state, "state": {**state["state"], "key": key}}
    return state


def _set_numpy_state(state: dict[str, Any] | None) -> None:
    if state is None:
        return
    import numpy

    if "key" in state["state"]:
        key = numpy.frombuffer(state["state"]["key"], dtype="<u4").astype(numpy.uint32)
        state = {**state, "state": {**state["state"], "key": key}}
    numpy.random.set_state(state)


class RngState:
    """The random number generators of a job, to be put into its state.

    Covers PyTorch's CPU generator, those of the accelerator in use, Python's ``random`` and NumPy's
    global generator. Saving, loading and restoring draw from none of them. Of a generator of your
    own, save ``get_state()`` (``torch.Generator``) or ``bit_generator.state`` (NumPy's).
    """

    def state_dict(self) -> dict[str, Any]:
        """The state of all generators, as it is now."""
        # What may be absent stands in lists: a list is restored as it was saved, whatever the
        # machine that restores it has.
        return {
            "torch": torch.get_rng_state(),
            "accelerator": _accelerator_states(),
            "python": [_python_state()],
            "numpy": [_numpy_state()],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Sets all generators to a state that :meth:`state_dict` gave."""
        (python,) = state_dict["python"]
        (numpy,) = state_dict["numpy"]
        torch.set_rng_state(state_dict["torch"])
        _set_accelerator_states(state_dict["accelerator"])
        _set_python_state(python)
        _set_numpy_state(numpy)
