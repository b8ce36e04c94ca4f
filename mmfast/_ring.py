"""A ring of processes: the rows of each visit all the others, one step at a time.

Rank r sends to r + 1 and receives from r - 1. While it works on the packet at hand, the next one
arrives, and what the rank before made of this packet, which follows one step behind. After as many
steps as there are ranks that has gone around and is sent home. A rank holds two packets at a time,
and the order in which anything is merged depends on ranks alone.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mmfast.ops._inputs import SCORE_TYPE, type_name

_TYPES = list(SCORE_TYPE)
# what the ranks tell each other beside numbers of the call, which may be this many
_HEADER = ("call", "rows", "D", "dtype", "requires_grad")
_NUMBERS = 2


@dataclass(frozen=True)
class Ring:
    """One rank's place among all.

    who: the caller, for messages.
    rows: how many rows of a packet each rank has, by rank.
    """

    who: str
    group: Any
    rank: int
    rows: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.rows)

    @property
    def first(self) -> int:
        """The number that this rank's first row has among those of all ranks."""
        return sum(self.rows[: self.rank])

    @property
    def total(self) -> int:
        """Number of rows of all ranks."""
        return sum(self.rows)

    def circulate(
        self,
        phase: str,
        packet: Sequence[Tensor],
        visit: Callable[..., Tensor | None],
        merge: Callable[[Tensor, Tensor], Tensor] = Tensor.add_,
    ) -> Tensor | None:
        """Show every rank the packet of every rank; returns what all have made of this one's.

        Args:
            phase: what goes on, for messages.
            packet: tensors with a row for each of this rank's.
            visit: called as visit(source, *packet) for each rank, this one first and then
                backwards; returns None, or a tensor with a row for each of the packet's. It must
                not keep the packet, whose memory serves again.
            merge: joins what the ranks before made, which it may overwrite, and what this one did.

        Raises:
            RuntimeError: a neighbour is gone.
        """
        packet = [x.contiguous() for x in packet]
        most = max(self.rows)
        front, back = [_Turns(x, most) for x in packet], None
        carried: list[Tensor] = []
        for step in range(self.size):
            source = (self.rank - step) % self.size
            last = step + 1 == self.size
            ahead = [] if last else [room.take(self.rows[source - 1]) for room in front]
            behind: list[Tensor] = [] if back is None else [back.take(self.rows[source])]
            leaving = carried if last else packet + carried
            arrive = self._exchange(phase, step, leaving, ahead + behind)
            made = visit(source, *packet)
            arrive()
            if made is not None:
                back = back or _Turns(made, most)
                carried = [merge(behind[0], made) if behind else made.contiguous()]
            packet, made = ahead, None
        if back is None:
            return None
        home = back.take(self.rows[self.rank])
        self._exchange(phase, self.size, carried, [home])()
        return home

    def gather(self, phase: str, x: Tensor) -> list[Tensor]:
        """`x` of every rank, by rank; for what is small, as all of it is held."""
        found = [x] * self.size

        def keep(source: int, packet: Tensor) -> None:
            found[source] = packet.clone()

        self.circulate(phase, [x], keep)
        return found

    def each(self) -> "Ring":
        """The same ring for packets of one row."""
        return Ring(self.who, self.group, self.rank, (1,) * self.size)

    def check_alike(self, phase: str, name: str, number: Tensor) -> None:
        """ValueError unless all ranks have the same `number`."""
        values = torch.cat(self.each().gather(phase, number.reshape(1))).tolist()
        self._check_alike(name, values)

    def _check_alike(self, name: str, values: Sequence[Any]) -> None:
        for rank, value in enumerate(values):
            if not _alike(value, values[0]):
                raise ValueError(
                    f"{self.who}: {name} must be alike on all ranks, got {values[0]} on "
                    f"{self._name(0)} and {value} on {self._name(rank)}"
                )

    def _name(self, rank: int) -> str:
        return f"rank {rank} (global rank {dist.get_global_rank(self.group, rank)})"

    def _exchange(
        self, phase: str, step: int, leaving: Sequence[Tensor], coming: Sequence[Tensor]
    ) -> Callable[[], None]:
        """Start to send and to receive; returns what waits until it is done."""
        if not leaving:
            return lambda: None
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        moves = [(dist.isend, x, after) for x in leaving] + [
            (dist.irecv, x, before) for x in coming
        ]
        place = partial(dist.get_global_rank, self.group)
        ops = [dist.P2POp(move, x, place(peer), self.group) for move, x, peer in moves]

        def wait() -> None:
            # some backends answer once for all
            peers = [[peer] for *_, peer in moves] if len(works) == len(ops) else [[before, after]]
            for work, of_work in zip(works, peers, strict=True):
                try:
                    work.wait()
                except RuntimeError as error:
                    raise self._lost(phase, step, of_work, error) from error

        try:
            works = dist.batch_isend_irecv(ops)
        except RuntimeError as error:
            raise self._lost(phase, step, [before, after], error) from error
        return wait

    def _lost(
        self, phase: str, step: int, peers: Sequence[int], error: RuntimeError
    ) -> RuntimeError:
        first, _, _ = str(error).partition("\n")
        return RuntimeError(
            f"{self.who}: {' or '.join(self._name(peer) for peer in peers)} did not answer "
            f"{self._name(self.rank)} in step {step} of {self.size} of the {phase}: it died, "
            f"raised, made another call or waits for a rank that did ({first})"
        )


class _Turns:
    """Two tensors by turns for what arrives, so that no step takes new memory."""

    def __init__(self, like: Tensor, most: int) -> None:
        # no view of `like`, which would keep it
        self._shape, self._like = (most, *like.shape[1:]), like.new_empty(0)
        self._rooms: list[Tensor | None] = [None, None]

    def take(self, rows: int) -> Tensor:
        """The one that was not taken last time, cut to so many rows."""
        self._rooms.reverse()
        room = self._rooms[0]
        if room is None:
            room = self._rooms[0] = self._like.new_empty(self._shape)
        return room[:rows]


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, float):
        # kinds of machines may differ in the last bits of an exponential
        return math.isclose(a, b, rel_tol=1e-5) or (math.isnan(a) and math.isnan(b))
    return bool(a == b)


def join(
    who: str,
    group: Any,
    k: Tensor,
    learns: Mapping[str, Tensor] | None = None,
    options: Sequence[Any] = (),
    **numbers: Tensor,
) -> Ring | None:
    """This rank's place in the ring of `group`; None without one, or where it is alone in it.

    The ranks tell each other how many rows they have, and that they mean the same: so every rank
    of the group must call. Reading the answer waits for a GPU.

    Args:
        who: the caller, for messages.
        group: a torch.distributed process group, None, or a ring that was joined already.
        k: [rows, D], what will travel.
        learns: tensors whose requires_grad must be alike, by name.
        options: what else must be alike.
        numbers: at most two tensors of one element that must be alike to 1e-5.

    Raises:
        TypeError: `group` is no process group; a tensor is a DTensor.
        ValueError: this process is not in the group; D, a type, an option or a number differs.
        RuntimeError: a rank does not answer.
        NotImplementedError: inside torch.compile.
    """
    if group is None or isinstance(group, Ring):
        return group
    if torch.compiler.is_compiling():
        raise NotImplementedError(
            f"{who}: group= cannot be compiled; compile the encoders and leave the loss outside"
        )
    rank, size = _place(who, group)
    learns = learns or {}
    for x in (k, *learns.values()):
        if hasattr(x, "device_mesh"):
            raise TypeError(
                f"{who}: group= takes each rank's own rows as a plain tensor, got a DTensor; "
                "pass x.to_local()"
            )
    if size == 1:
        return None
    ring = Ring(who, group, rank, (1,) * size)
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in learns.values()]
    own = (
        zlib.crc32(repr((who, *options)).encode()),
        k.shape[0],
        k.shape[1],
        _TYPES.index(k.dtype),
        sum(flag << place for place, flag in enumerate(wanted)),
    )
    header = torch.zeros(1, len(own) + _NUMBERS, dtype=torch.float64, device=k.device)
    header[0, : len(own)] = torch.tensor(own, dtype=torch.float64)
    for place, number in enumerate(numbers.values()):
        header[0, len(own) + place] = number.detach()
    table = torch.cat(ring.gather("exchange of sizes", header)).T.tolist()
    found = dict(zip((*_HEADER, *numbers), table, strict=False))
    for other, call in enumerate(found["call"]):
        if call != found["call"][0]:
            raise ValueError(
                f"{who}: all ranks must call the same loss with the same options, but those of "
                f"{ring._name(0)} and {ring._name(other)} differ"
            )
    ring._check_alike("D", [int(x) for x in found["D"]])
    ring._check_alike("dtype", [type_name(_TYPES[int(x)]) for x in found["dtype"]])
    for place, name in enumerate(learns):
        flags = [bool(int(x) >> place & 1) for x in found["requires_grad"]]
        ring._check_alike(f"requires_grad of {name}", flags)
    for name in numbers:
        ring._check_alike(name, found[name])
    return Ring(who, group, rank, tuple(int(x) for x in found["rows"]))


def _place(who: str, group: Any) -> tuple[int, int]:
    """(rank, size) of this process in `group`."""
    outside = group is dist.GroupMember.NON_GROUP_MEMBER
    if not outside and not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"{who}: group must be a torch.distributed process group or None, "
            f"got {type(group).__name__}"
        )
    if outside or dist.get_rank(group) < 0:
        raise ValueError(
            f"{who}: this process (global rank {dist.get_rank()}) is not in the group it was given"
        )
    return dist.get_rank(group), dist.get_world_size(group)


def whole_world(who: str, rank: int, world_size: int) -> Any:
    """The default group for a Module that is told its place in it; None for one process.

    Raises:
        ValueError: there is no default group, or another place in it.
    """
    if world_size == 1:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{who}: world_size={world_size} needs torch.distributed.init_process_group first"
        )
    place = dist.get_rank(), dist.get_world_size()
    if place != (rank, world_size):
        raise ValueError(
            f"{who}: rank and world_size must be {place[0]} and {place[1]} as torch.distributed "
            f"has them, got {rank} and {world_size}"
        )
    return dist.group.WORLD
