"""What data-loader workers send, with their errors as the user should see them.

A dataset of ours returns a ``TeachonceError`` as a value instead of raising it: the loader would wrap it into a
worker's traceback and hide the row's name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from shared.errors import TeachonceError, TrainingError


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
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise TrainingError(
                f"a data-loader worker died: {str(error).splitlines()[0]}. Often the host's memory did not "
                f"suffice; lower {workers_setting}"
            ) from error
        if isinstance(item, TeachonceError):
            raise item
        yield item
