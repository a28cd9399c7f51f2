"""Where the ranks of a test meet."""

from __future__ import annotations

from torch.distributed import TCPStore


class Rendezvous:
    """A store in this process, as torchrun's agent has it: its port is taken from the first moment on.

    A port that is found free and let go may be another process's when the first rank wants it.
    """

    def __init__(self) -> None:
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def environment(self, rank: int, num_ranks: int) -> dict[str, str]:
        """Of a rank's process, as torchrun sets it."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
