"""Several processes as one run: how they find each other, who writes, and what they agree on.

Every process runs the same program on its own devices of one mesh. The first one (the chief) writes the run
directory; whatever one process alone can see (a file, a signal) is told to the others before they act on it,
as processes that do different things wait for each other for ever.
"""

import contextlib
import dataclasses
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlm.errors import UserError, check

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Launcher:
    """What starts several processes, and the variables in which it tells each of them its place."""

    name: str
    sign: str  # what JAX must be told to find the others; '' = JAX cannot
    count: str  # processes in all
    rank: str  # this one's number
    local: str  # its number on its machine
    started: str = ""  # is set in its processes and in no other; '' = `count` is
    step: str = ""  # processes of this step, of which `count` may tell more: an interactive shell is one


# The first that fits counts: `mpirun` under SLURM leaves the variables of both. What needs a server to be
# asked (TPU VMs, Kubernetes) is `coordinator="auto"`. Open MPI 5 no longer says where its first process is.
LAUNCHERS = (
    Launcher(
        "Open MPI",
        "OMPI_MCA_orte_hnp_uri",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ),
    # A batch script, which is one process, has the number of tasks too, but no step.
    Launcher(
        "SLURM",
        "SLURM_STEP_NODELIST",
        "SLURM_NTASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_STEP_NODELIST",
        "SLURM_STEP_NUM_TASKS",
    ),
    Launcher("MPI", "", "PMI_SIZE", "PMI_RANK", "MPI_LOCALRANKID"),
)


def launcher(environment: Mapping[str, str]) -> Launcher | None:
    """The launcher that started this process as one of several; None = it is alone.

    >>> launcher({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}).name
    'SLURM'
    >>> launcher({"SLURM_NTASKS": "2"})
    >>> shell_of_salloc = {"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}
    >>> launcher(shell_of_salloc)
    """
    for each in LAUNCHERS:
        if (each.started or each.count) not in environment:
            continue
        if int(environment.get(each.step or each.count) or environment.get(each.count) or "1") > 1:
            return each
        if not each.started:
            return None  # `mpirun -n 1` in a step of several
    return None


def start(coordinator: str = "", num_processes: int | None = None, process_id: int | None = None) -> None:
    """Join the other processes; before anything asks JAX for its devices. Alone, nothing happens.

    Args:
        coordinator: `host:port` of process 0, with the next two or under a launcher that tells them; 'auto' =
            as `jax.distributed.initialize()` finds out (SLURM, Open MPI 4, TPU VM, GKE, Kubernetes); '' = so
            too if a launcher's variables say that there are several processes.
        num_processes: in all.
        process_id: this one's number, from 0.

    Under a launcher a process has one GPU of its machine, unless JAX_LOCAL_DEVICE_IDS names others.

    Raises:
        UserError: flags that do not belong together, nobody to join, or several processes that were started
            without being told where the first is: each would train alone.
    """
    given = {"--num_processes": num_processes, "--process_id": process_id}
    several = launcher(os.environ)
    if coordinator in ("", "auto"):
        for name, value in given.items():
            check(value is None, f"{name}={value} needs --coordinator=HOST:PORT, the address of process 0")
        if (coordinator == "" and several is None) or jax.distributed.is_initialized():
            return
        if coordinator == "" and several.sign not in os.environ:
            raise UserError(
                f"{several.name} started {os.environ[several.count]} processes ({several.count}), but does "
                "not say where the first one is: add --coordinator=HOST:PORT, the machine of process 0 and a "
                "free port there, such as 10.0.0.1:8476; the numbers are then taken from "
                f"{several.count} and {several.rank}. For lone runs, unset {several.count}"
            )
        try:
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:  # no cluster that JAX knows, or none that it can ask
            if isinstance(error, RuntimeError) and "mpi4py" not in str(error):
                raise
            raise UserError(
                f"--coordinator={coordinator}: JAX finds no cluster here ({error}); give "
                "--coordinator=HOST:PORT --num_processes=N --process_id=I"
            ) from error
        return
    local = None
    if several is not None and num_processes is None and process_id is None and several.rank in os.environ:
        num_processes, process_id = int(os.environ[several.count]), int(os.environ[several.rank])
        given = {several.count: num_processes, several.rank: process_id}
    # A process takes the GPU of its number on its machine, unless it is told which.
    if several is not None and several.local in os.environ and "JAX_LOCAL_DEVICE_IDS" not in os.environ:
        local = [int(os.environ[several.local])]
    for name, value in given.items():
        check(value is not None, f"--coordinator={coordinator} needs {name}")
    host, colon, port = coordinator.rpartition(":")
    check(
        bool(host and colon and port.isdigit()),
        f"--coordinator={coordinator!r} is not HOST:PORT, such as 10.0.0.1:8476",
    )
    (count_name, count), (rank_name, rank) = given.items()
    check(0 <= rank < count, f"{rank_name}={rank} is not in [0, {count_name}={count})")
    jax.distributed.initialize(coordinator, count, rank, local_device_ids=local)


def is_chief() -> bool:
    """Whether this process is the one that writes files and speaks to the user."""
    return jax.process_index() == 0


@contextlib.contextmanager
def leaving_at_once(*alike: type[BaseException]) -> Iterator[None]:
    """End the process at once if the work inside fails, with its traceback.

    At an ordinary exit JAX waits for all processes to leave together, which one that has failed cannot expect
    of the others, nor they of it. What fails in all of them alike leaves the usual way: user errors, which
    are told to all, and the exceptions of `alike`.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if jax.process_count() == 1 or isinstance(error, alike):
            raise
        traceback.print_exc()
        print(f"jaxlm: process {jax.process_index()} of {jax.process_count()} failed", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def from_chief(fn: Callable[[], T]) -> T:
    """`fn()`, called in the chief alone; every process gets its value, or its `UserError`.

    Args:
        fn: its value must be picklable, and equal to what it was, if there are several processes.
    """
    if jax.process_count() == 1:
        return fn()
    told: tuple[Any, str] = (None, "")
    failure: UserError | None = None
    if is_chief():
        try:
            told = (fn(), "")
        except UserError as error:
            failure, told = error, (None, str(error))
    value, message = _tell(told)
    if failure is not None:
        raise failure
    if message:
        raise UserError(message)
    return told[0] if is_chief() else value


def _tell(value: Any) -> Any:
    """The chief's `value` in every process."""
    data = np.frombuffer(pickle.dumps(value), np.uint8) if is_chief() else np.zeros(0, np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(data.size)))
    room = np.zeros(length, np.uint8) if not is_chief() else data
    return pickle.loads(np.asarray(multihost_utils.broadcast_one_to_all(room), np.uint8).tobytes())


def chief_first(fn: Callable[[], T]) -> T:
    """`fn()` in every process, in the others when the chief is done: it may leave files that they find.

    A `UserError` of one process, which alone may lack a file, is raised in all.
    """
    made: list[T] = []
    from_chief(lambda: made.append(fn()))
    if jax.process_count() == 1:
        return made[0]
    failure: UserError | None = None
    if not made:
        try:
            made.append(fn())
        except UserError as error:
            failure = error
    told = _tell_all("" if failure is None else str(failure))
    if failure is not None:
        raise failure
    for process, message in enumerate(told):
        check(not message, f"process {process}: {message}")
    return made[0]


def _tell_all(message: str) -> list[str]:
    """The messages of all processes."""
    data = np.frombuffer(message.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(data.size))
    padded = np.pad(data, (0, int(sizes.max()) - data.size))
    texts = multihost_utils.process_allgather(padded) if padded.size else np.zeros((len(sizes), 0))
    return [np.asarray(t[:n], np.uint8).tobytes().decode() for t, n in zip(texts, sizes, strict=True)]


class AgreedStop:
    """`stop(step) -> reason` that all processes answer alike, whichever of them has a reason.

    Each call sends this process's answer through a small maximum on the devices and reads the one that was
    sent a step before, which is there by then: nothing waits, and the run ends one step later.

    Args:
        stop: this process's own answer.
        mesh: all devices of the run.
    """

    def __init__(self, stop: Callable[[int], str], mesh: Mesh) -> None:
        self._stop, self._reason, self._sent = stop, "", None
        self._shape, self._places = (mesh.size,), NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __call__(self, step: int) -> str:
        """Why all should stop after `step`, or ''."""
        self._reason = self._stop(step) or self._reason
        names = {number.name: int(number) for number in (signal.SIGINT, signal.SIGTERM)}
        code = names.get(self._reason, 1) if self._reason else 0
        flags = jax.make_array_from_callback(
            self._shape, self._places, lambda _: np.full(1, code, np.int32), dtype=np.int32
        )
        before, self._sent = self._sent, self._largest(flags)
        agreed = 0 if before is None else int(before)
        if agreed > 1:
            return signal.Signals(agreed).name
        return (self._reason or "another process was told to stop") if agreed else ""
