"""What the tests of the stagers need."""

from __future__ import annotations

from typing import Any

import torch
from helpers import bits_of

from strandline.torch import CheckpointStagerConfig, StateDictStager


def plain_config(**options: Any) -> CheckpointStagerConfig:
    """For a machine without an accelerator."""
    return CheckpointStagerConfig(
        **{"use_pinned_memory": False, "use_non_blocking_copy": False, **options}
    )


def stage(state: Any, **options: Any) -> Any:
    """Stages with a stager that is closed afterwards."""
    stager = StateDictStager(**options)
    try:
        return stager.stage(state)
    finally:
        stager.close()


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def assert_staged(tensor: torch.Tensor, source: torch.Tensor) -> None:
    """Fails unless a tensor is a true copy of another in other memory."""
    assert (tensor.dtype, tensor.shape, tensor.stride()) == (
        source.dtype,
        source.shape,
        source.stride(),
    )
    assert tensor.device.type == "cpu"
    assert bits_of(tensor) == bits_of(source)
    if source.numel() > 0:
        assert storage_of(tensor) != storage_of(source)
