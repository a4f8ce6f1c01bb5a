"""One of several processes that share a job, as torchrun starts them; or the only one."""

from __future__ import annotations

import os
from datetime import timedelta
from types import TracebackType


class Processes:
    """rank of world, by the variables that torchrun sets; alone, 0 of 1."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))

    def __enter__(self) -> Processes:
        if self.world > 1:
            import torch.distributed as dist

            # a process waits for the slowest at the end, and that may be a day behind
            dist.init_process_group("gloo", timeout=timedelta(days=30))
        return self

    def wait_for_all(self) -> None:
        if self.world > 1:
            import torch.distributed as dist

            dist.barrier()

    def total(self, *numbers: int) -> list[int]:
        """The sums over all processes."""
        if self.world == 1:
            return list(numbers)
        import torch
        import torch.distributed as dist

        sums = torch.tensor(numbers)
        dist.all_reduce(sums)
        return [int(number) for number in sums]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self.world > 1:
            import torch.distributed as dist

            dist.destroy_process_group()
