"""The epochs of a training run as TensorBoard's event files, for who wants to watch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from maodun.core.errors import InputError


def event_writer() -> Any:
    """Return the class that writes event files; InputError when TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise InputError("tensorboard", "is not installed", "pip install 'maodun[tensorboard]'") from error
    return SummaryWriter


@contextmanager
def event_log(folder: Path, *, wanted: bool) -> Iterator[Callable[[dict[str, float]], None]]:
    """Give a function that appends an epoch's line to the event files of `folder`, or does nothing unless `wanted`.

    A run that goes on replaces what was said of its first epoch and later ones.
    """
    writer: Any = None

    def tell(line: dict[str, float]) -> None:
        nonlocal writer
        epoch = int(line["epoch"])
        if writer is None:
            writer = event_writer()(str(folder), purge_step=epoch)
        for name, value in line.items():
            if name != "epoch":
                writer.add_scalar(name, value, epoch)
        writer.flush()

    try:
        yield tell if wanted else lambda _: None
    finally:
        if writer is not None:
            writer.close()
