"""The processes of one job, as torchrun starts them. Alone, all of this does nothing."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tritonbnn.cli import UserError
from tritonbnn.meeting import exchange, meet
from tritonbnn.stop import Stopped

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Where this process stands among those of the job.

    Attributes:
        rank: number of this process.
        size: number of processes.
        control: a group for small facts on the host, which never waits for a GPU.
        store: where they met; None alone.
    """

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None
    store: dist.Store | None = None

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def agree(self, *facts: int) -> list[int]:
        """The largest of each fact over all processes; every process gets the same answer."""
        if self.size == 1:
            return list(facts)
        tensor = torch.tensor(facts)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.control)
        return tensor.tolist()

    def total(self, sums: Tensor) -> Tensor:
        """The sum of a CPU tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(sums, group=self.control)
        return sums

    def gather(self, value: T) -> list[T]:
        """``value`` of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def share(self, value: T) -> T:
        """The leading process's ``value``, in every process."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def share_buffers(self, model: nn.Module) -> None:
        """Give every process the leading one's running statistics."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def lead(self, action: Callable[[], T]) -> T | None:
        """Do ``action`` in the leading process alone, and wait for it.

        Its result is None elsewhere. A user's mistake that it meets ends every process alike.
        """
        result, mistake = None, None
        if self.leads:
            try:
                result = action()
            except UserError as error:
                mistake = str(error)
        mistake = self.share(mistake)
        if mistake is not None:
            raise UserError(mistake)
        return result

    def everywhere(self, name: str, action: Callable[[], T]) -> T:
        """Do ``action`` in every process, and wait until all have done it.

        This may take minutes, and one process longer than another. All waiting can be stopped.

        Args:
            name: of what is done; no two calls may have the same.
            action: what to do.

        Raises:
            UserError: a process met a mistake of the user. All say the same, and whose it was.
            Stopped: a process was asked to stop.
        """
        if self.store is None:
            return action()
        said: dict[str, Any] = {}
        try:
            result = action()
        except UserError as error:
            said = {"mistake": str(error)}
        except Stopped as stopped:
            self.store.set(f"{name}/{self.rank}", json.dumps({"signal": int(stopped.signal)}))
            raise
        texts = exchange(self.store, name, self.rank, self.size, json.dumps(said))
        answers = [json.loads(text) for text in texts]
        for answer in answers:
            if "signal" in answer:
                raise Stopped(answer["signal"])
        mistakes = [answer.get("mistake") for answer in answers]
        for rank, mistake in enumerate(mistakes):
            if mistake is not None:
                alike = all(other == mistake for other in mistakes)
                raise UserError(mistake if alike else f"process {rank}: {mistake}")
        return result

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Refuse facts that are not the same in every process.

        Args:
            facts: by name, in JSON's types.

        Raises:
            UserError: naming the first process that has another one, and which fact it is.
        """
        store = self.store
        if store is None:
            return
        mine = json.loads(json.dumps(facts))
        if self.leads:
            store.set("facts", json.dumps(facts))

        def look() -> None:
            theirs = json.loads(store.get("facts"))
            for name in dict.fromkeys((*theirs, *mine)):
                if mine.get(name) != theirs.get(name):
                    raise UserError(_difference(name, mine.get(name), theirs.get(name)))

        self.everywhere("compare", look)


def _difference(name: str, mine: Any, theirs: Any) -> str:
    """How a fact differs from that of process 0; of lists the first entry that does."""
    if isinstance(mine, list) and isinstance(theirs, list):
        if len(mine) != len(theirs):
            mine, theirs = f"{len(mine)} entries", f"{len(theirs)} entries"
        else:
            place = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
            name, mine, theirs = f"{name} number {place}", mine[place], theirs[place]
    return (
        f"{name} is {mine!r}, and {theirs!r} in process 0: start all processes with the same"
        " command, the same versions and the same data"
    )


def launched() -> bool:
    """Whether torchrun started this process.

    Raises:
        UserError: only some of its variables are set.
    """
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if len(missing) == len(VARIABLES):
        return False
    if missing:
        raise UserError(
            f"torchrun's variables are half set ({', '.join(missing)} missing):"
            " start with torchrun, or unset the others"
        )
    for name in VARIABLES:
        if name != "MASTER_ADDR" and not os.environ[name].isdecimal():
            raise UserError(
                f"{name} must be a whole number, not {os.environ[name]!r}: use torchrun"
            )
    rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if rank >= size:
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE {size}: ranks are 0 to WORLD_SIZE - 1; use torchrun"
        )
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT must be 1 to {2**16 - 1}, not {port}")
    return True


def join(device: torch.device) -> World:
    """Meet the other processes: NCCL for CUDA, gloo otherwise.

    Raises:
        UserError: they do not meet.
    """
    if not launched():
        return World()
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = device.type == "cuda"
    store = meet(rank, size)
    try:
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            device_id=device if on_gpu else None,
        )
        return World(rank, size, dist.new_group(backend="gloo"), store)
    except RuntimeError as error:
        raise UserError(
            f"process {rank} cannot reach the others ({str(error).strip().splitlines()[0]}):"
            " name the network interface in GLOO_SOCKET_IFNAME, and with GPUs in NCCL_SOCKET_IFNAME"
        ) from error


def exchanging_gradients(model: nn.Module) -> DistributedDataParallel:
    """``model``, whose gradients become means over the processes.

    Each process feeds its own BatchNorm. The leading one's statistics are the model's.
    """
    # torch 2.14 renamed it
    renamed = "forward_sync_buffers" in signature(DistributedDataParallel).parameters
    apart: Any = {"forward_sync_buffers" if renamed else "broadcast_buffers": False}
    return DistributedDataParallel(model, **apart)


def leave() -> None:
    """Part from the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
