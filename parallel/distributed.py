"""Several processes of one run: how they start, wait for one another, and end together.

Each process runs the same program on its own devices. The first (index 0) alone writes; the others
wait for what they need of it. Words between them go through the coordination service of
jax.distributed, which the first process holds, not through devices.
"""

import contextlib
import functools
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs.checks import UserError, require
from parallel.mesh import BATCH_AXES

START_SECONDS = 300
"""Time for all processes to come together."""
HEARTBEAT_SECONDS = 60
"""Silence after which a process counts as lost, and jax ends the others."""
WAIT_SECONDS = 24 * 3600
"""For the first process's work: a corpus may take hours. If it ends, the wait ends sooner."""
FAREWELL_SECONDS = 5
"""Time that a process which fails gives the others to hear why; the first takes jax's service with
it when it ends."""
CLUSTERS = ("SLURM_", "OMPI_", "KUBERNETES_", "TPU_", "JAX_COORDINATOR_")
"""Prefixes of the environment variables without which jax looks for no cluster."""
LOST = ("Gloo", "NCCL", "Connection reset", "Connection closed", "Socket closed", "heartbeat")
"""Words in the errors of operations whose other side has gone."""
GO_ON = (
    ", and its own output says why: start all of them again with the same command, they go on from "
    "the last checkpoint"
)
FAILURE, HEARD, READY = "moesaic/failure", "moesaic/heard", "moesaic/ready"
"""Keys of the coordination service."""

T = TypeVar("T")


@dataclass(frozen=True)
class Launch:
    """A process's place among those of its run."""

    coordinator_address: str
    """Host and port of the first process."""
    num_processes: int
    process_id: int
    local_device_ids: tuple[int, ...] | None = None
    """Accelerators of this machine that are this process's; None: all that it sees."""


def stated_launch(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> Launch | None:
    """The launch that a command line states; None where it states nothing.

    Raises:
      UserError: some of the three without the others, or a value that can't be.
    """
    options = {
        "--coordinator-address": coordinator_address,
        "--num-processes": num_processes,
        "--process-id": process_id,
    }
    missing = [name for name, value in options.items() if value is None]
    if coordinator_address is None or num_processes is None or process_id is None:
        given = " and ".join(name for name in options if name not in missing)
        require(not given, f"{given} came without {' and '.join(missing)}: give all three, or none")
        return None
    host, _, port = coordinator_address.rpartition(":")
    require(
        bool(host) and port.isdecimal() and 0 < int(port) < 2**16,
        f"--coordinator-address {coordinator_address!r} must be the first process's HOST:PORT",
    )
    require(num_processes > 0, f"--num-processes {num_processes} must be at least 1")
    require(
        0 <= process_id < num_processes,
        f"--process-id {process_id} must be one of 0 to {num_processes - 1}, as --num-processes is "
        f"{num_processes}",
    )
    return Launch(coordinator_address, num_processes, process_id)


def detected_launch(num_devices: int) -> Launch | None:
    """The launch that jax finds in the environment: of SLURM, Open MPI, Kubernetes or a TPU pod.

    None where it finds none, or a single process.

    Args:
      num_devices: of the mesh. jax gives each process one accelerator where several may be on a
        machine; with more devices than processes, each takes all that it sees.
    Raises:
      UserError: the environment is one that jax knows, and does not say enough.
    """
    if not any(name.startswith(CLUSTERS) for name in os.environ) or _is_plain_pod():
        return None
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize itself asks

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            coordinator_address=os.environ.get("JAX_COORDINATOR_ADDRESS"),
            num_processes=None,
            process_id=None,
            local_device_ids=None,
            cluster_detection_method=None,
            initialization_timeout=START_SECONDS,
        )
    except Exception as error:  # of the metadata services it asks
        raise UserError(
            f"jax can't tell the processes of this run from its environment "
            f"({' '.join(str(error).split())}): give --coordinator-address, --num-processes and "
            "--process-id"
        ) from error
    address, num_processes, process_id, device_ids = found
    if address is None or num_processes is None or process_id is None:
        require(
            address is None,
            f"JAX_COORDINATOR_ADDRESS is {address!r}, and the environment does not say how many "
            "processes there are: give --coordinator-address, --num-processes and --process-id",
        )
        return None
    if num_processes == 1:
        return None
    own = tuple(device_ids) if device_ids and num_devices == num_processes else None
    return Launch(address, num_processes, process_id, own)


def _is_plain_pod() -> bool:
    """Whether this is a pod of Kubernetes that no Job numbers, of which jax makes an error."""
    is_pod, is_tpu = (
        name in os.environ for name in ("KUBERNETES_SERVICE_HOST", "TPU_WORKER_HOSTNAMES")
    )
    return is_pod and not is_tpu and "JOB_COMPLETION_INDEX" not in os.environ


def start(launch: Launch, num_devices: int) -> None:
    """Joins the run's processes; to be called before JAX touches any device.

    On a host without accelerators each process makes its share of the devices.

    Args:
      num_devices: of the mesh, over all processes.
    Raises:
      UserError: devices that the processes do not divide; the first one's port is taken.
    """
    require(
        num_devices % launch.num_processes == 0,
        f"the mesh has {num_devices} devices, which must be divisible by the "
        f"{launch.num_processes} processes: change the mesh or the number of processes",
    )
    if launch.process_id == 0:
        _require_free_port(launch.coordinator_address)
    jax.config.update("jax_num_cpu_devices", num_devices // launch.num_processes)
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM, which is ours
    with _deadline(launch):
        jax.distributed.initialize(
            coordinator_address=launch.coordinator_address,
            num_processes=launch.num_processes,
            process_id=launch.process_id,
            local_device_ids=launch.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=2 * START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    threading.Thread(target=_end_with_others, name=FAILURE, daemon=True).start()


def _require_free_port(address: str) -> None:
    """
    Raises:
      UserError: another program of this machine listens there, which jax would share with it.
    """
    has_both = socket.has_dualstack_ipv6()
    with socket.socket(socket.AF_INET6 if has_both else socket.AF_INET) as found:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ended connections may linger
        try:
            found.bind(("", int(address.rpartition(":")[2])))
        except OSError as error:
            raise UserError(
                f"the first process can't listen at {address} ({error.strerror}): give all "
                "processes a --coordinator-address with another port"
            ) from error


def is_started() -> bool:
    """Whether this process is one of several."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return not is_started() or _state().process_id == 0


def first_then_others(on_first: Callable[[], T], on_others: Callable[[], T]) -> T:
    """What the first process makes and the others, when it is there, look at.

    All processes must come here the same number of times.
    """
    if not is_started():
        return on_first()
    key = f"{READY}/{next(_turns)}"
    if not is_first():
        _client().blocking_key_value_get(key, 1000 * WAIT_SECONDS)
        return on_others()
    made = on_first()
    _client().key_value_set(key, "done")
    return made


_turns = itertools.count()


def connect(mesh: Mesh) -> None:
    """Makes the connections of every group of the mesh's devices, when all processes have come.

    On the CPU a group is connected by its first collective operation, and gloo gives up where a
    process comes to it half a minute after another: one that compiles more slowly would.
    """
    if not is_started() or mesh.devices.flat[0].platform != "cpu":
        return
    _client().wait_at_barrier(f"moesaic/connect/{next(_turns)}", 1000 * WAIT_SECONDS)
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    groups = [g for n in range(len(axes)) for g in itertools.combinations(axes, n + 1)]

    def sums(x: jax.Array) -> jax.Array:
        return sum((jax.lax.psum(x, group) for group in groups), x)

    everywhere = PartitionSpec()
    add = jax.shard_map(sums, mesh=mesh, in_specs=everywhere, out_specs=everywhere, check_vma=False)
    jax.block_until_ready(jax.jit(add)(np.float32(0)))


def largest(value: int) -> jax.Array:
    """The largest of the processes' values, int32 on the devices; not waited for."""
    split, greatest = _greatest()
    own = np.full(jax.local_device_count(), value, np.int32)
    return greatest(jax.make_array_from_process_local_data(split, own))


@functools.cache
def _greatest() -> tuple[NamedSharding, Callable[[jax.Array], jax.Array]]:
    """How a value of each device is laid out, and the program that finds the greatest."""
    mesh = Mesh(np.array(jax.devices()), ("all",))
    split, whole = NamedSharding(mesh, PartitionSpec("all")), NamedSharding(mesh, PartitionSpec())
    return split, jax.jit(lambda values: values.max(), out_shardings=whole)


def batch_block(mesh: Mesh, num_rows: int) -> tuple[int, int]:
    """(i, n): of a batch's rows, cut into n blocks, this process's devices hold the i-th.

    Raises:
      UserError: they hold rows of several places.
    """
    split = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    places = split.addressable_devices_indices_map((num_rows,)).values()
    held = {i for place in places if place for i in range(*place[0].indices(num_rows))}
    begin, size = min(held), len(held)
    require(
        max(held) + 1 == begin + size and begin % size == 0 and num_rows % size == 0,
        f"the mesh {dict(mesh.shape)} gives process {jax.process_index()} rows of the batch that "
        "are not one block: change the order of the mesh's axes or their sizes",
    )
    return begin // size, num_rows // size


def on_host(x: Any) -> np.ndarray:
    """A whole array on the host, wherever its parts lie; every process must ask for it."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return jax.device_get(x)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(x, tiled=True)


def leave() -> None:
    """Ends a process that has done its part, when the others have done theirs."""
    if not is_started():
        return
    _client().wait_at_barrier("moesaic/leave", 1000 * WAIT_SECONDS)
    _ending.set()
    if is_first():
        _client().key_value_set(FAILURE, "")  # there will be none: the threads may end
    for thread in threading.enumerate():
        if thread.name == FAILURE:
            thread.join(FAREWELL_SECONDS)
    jax.distributed.shutdown()


def lost_process(error: BaseException) -> str | None:
    """A sentence for an error that comes of another process's end; None for any other.

    With a sentence, this process has begun to end.
    """
    if not is_started():
        return None
    texts, inner = [], error
    while inner is not None:
        texts.append(str(inner))
        inner = inner.__cause__ or inner.__context__
    if not any(word in text for text in texts for word in LOST):
        return None
    if not is_first():
        _ending.set()  # without a farewell: the first may be the one, and jax about to abort
    return f"another process of this run has ended{GO_ON}"


def announce_failure(sentence: str) -> None:
    """Tells the other processes, which end too, why this one is about to."""
    if not is_started() or _ending.is_set():
        return
    _ending.set()
    with contextlib.suppress(Exception):  # the service may be gone, and the others with it
        text = f"process {_state().process_id} has ended: {sentence.strip().splitlines()[-1]}"
        _client().key_value_set(FAILURE, text)  # refused where another was first
    _say_farewell()


_ending = threading.Event()
"""Set when this process has begun to end."""


def _say_farewell() -> None:
    """Marks that this process needs the service no longer; the first waits for the others."""
    state = _state()
    with contextlib.suppress(Exception):
        _client().key_value_set(f"{HEARD}/{state.process_id}", "")
        deadline = time.monotonic() + FAREWELL_SECONDS
        while is_first() and time.monotonic() < deadline:
            if len(_client().key_value_dir_get(HEARD)) == state.num_processes:
                return
            time.sleep(0.1)


def _end_with_others() -> None:
    """Ends this process when another announces that it fails; runs in a thread of its own, as the
    main one may wait in a collective operation for the one that is gone.
    """
    try:
        sentence = _client().blocking_key_value_get(FAILURE, 1000 * 365 * WAIT_SECONDS)
        if sentence:
            time.sleep(1)  # the main thread may be ending with a sentence of its own
    except Exception:  # the service is gone, for which jax aborts within a moment
        sentence = f"the first process of this run has ended{GO_ON}"
    if sentence and not _ending.is_set():
        _ending.set()
        print(f"stopped: {sentence}", file=sys.stderr, flush=True)
        _say_farewell()
        os._exit(1)


@contextlib.contextmanager
def _deadline(launch: Launch) -> Iterator[None]:
    """Ends the process with a sentence if the block takes too long: jax itself would abort."""
    sentence = (
        f"error: the {launch.num_processes} processes did not come together at "
        f"{launch.coordinator_address} within {START_SECONDS} s (this is process "
        f"{launch.process_id}): start all of them with the same --coordinator-address, which every "
        "machine must reach, and --num-processes, each with its own --process-id; with "
        "--num-processes 1 a run stands alone whatever the environment says"
    )

    def end() -> None:
        print(sentence, file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(START_SECONDS, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _state() -> Any:
    from jax._src import distributed  # jax.distributed has no names for these

    return distributed.global_state


def _client() -> Any:
    return _state().client
