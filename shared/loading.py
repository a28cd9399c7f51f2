"""What data-loader workers send, with their errors as the user should see them.

A dataset of ours returns a ``TeachonceError`` as a value instead of raising it: the loader would wrap it into a
worker's traceback and hide the row's name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from shared.errors import TeachonceError, TrainingError


def leave_process_group(worker: int) -> None:
    """``worker_init_fn`` of every loader: signals to the parent's process group do not reach the worker.

    torchrun signals whole groups, and a worker that died of SIGTERM took its trainer along before that had saved.
    To ignore SIGTERM instead is no cure: the interpreter ends its children by it, and then waits for them for ever.
    """
    os.setpgid(0, 0)


def loaded_items(loader: DataLoader, *, workers_setting: str) -> Iterator[Any]:
    """The loader's items in order.

    workers_setting  the recipe's key for the number of workers, named when one of them dies
    Raises   TeachonceError  one that came as a value
             TrainingError   when a worker process died
    """
    loaded = iter(loader)
    while True:
        try:
            item = next(loaded)
        except StopIteration:
            return
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not _says_that_a_worker_died(error):
                raise
            raise TrainingError(
                f"a data-loader worker died: {_first_line(error)}. Often the host's memory did not "
                f"suffice; lower {workers_setting}"
            ) from error
        if isinstance(item, TeachonceError):
            raise item
        yield item


def _says_that_a_worker_died(error: Exception) -> bool:
    """The loader's own words, or the connection that broke while a dead worker's tensors were fetched.

    An exception of the dataset's code has the worker's traceback in its text.
    """
    if "Caught " in str(error):
        return False
    return isinstance(error, ConnectionError | EOFError) or "DataLoader worker" in str(error)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0] or type(error).__name__
