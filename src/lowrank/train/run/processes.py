"""A run in several processes, as torchrun and `accelerate launch` start them: who speaks, writes and waits.

Each process knows its place from the environment. All of them read the data and hold the model; the first one
prints, writes and reports.
"""

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

from lowrank.errors import ConfigError, MissingExtraError
from lowrank.train.settings import TrainSettings

T = TypeVar("T")
R = TypeVar("R")
ON_CPU = False  # whether FSDP may be asked for without a GPU: in tests, which tell accelerate so
PATIENCE = 20.0  # seconds in which the first process has said what is wrong with settings or data
SPOKEN = "lowrank/spoken"  # the key of the process whose error is shown


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def first() -> bool:
    return rank() == 0


def begin(device: str) -> None:
    """Brings the processes together; each gets its own GPU. device: model.device. Nothing for a single one."""
    import torch

    if count() == 1 or torch.distributed.is_initialized():
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    backend = "cuda:nccl,cpu:gloo" if on_gpu else "gloo"
    # where one fails torchrun ends the others: the wait is for slow ones, that read or evaluate
    torch.distributed.init_process_group(backend, timeout=timedelta(hours=3))


def sharing(settings: TrainSettings) -> dict[str, Any]:
    """TrainingArguments that share the weights among processes, where the settings say so.

    Raises ConfigError where that cannot be done, MissingExtraError without DeepSpeed.
    """
    import torch

    if settings.fsdp and settings.deepspeed:
        raise ConfigError("train.fsdp and train.deepspeed both share the weights: choose one.")
    if settings.deepspeed:
        if importlib.util.find_spec("deepspeed") is None:
            raise MissingExtraError(
                "train.deepspeed: DeepSpeed is not installed: pip install deepspeed"
            )
        if not os.path.isfile(settings.deepspeed):
            raise ConfigError(f"train.deepspeed: there is no file {settings.deepspeed}")
        return {"deepspeed": settings.deepspeed}
    if not settings.fsdp:
        return {}
    if count() == 1:
        raise ConfigError(
            "train.fsdp shares the weights among processes, and this is the only one.\n"
            "Start several: torchrun --nproc_per_node 8 -m lowrank train run.yaml"
        )
    if not (torch.cuda.is_available() or ON_CPU):
        raise ConfigError("train.fsdp: accelerate shares weights among GPUs, and there is none.")
    return {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}


def announce(model: Any) -> None:
    """Tells DeepSpeed's ZeRO-3 which parameters each of our layers reads of the modules beneath it.

    It finds out by itself only about those that are not at hand in the first forward. After a resume the small
    ones all are, and would not be fetched when, later, they are not.
    """
    import deepspeed

    from lowrank.wrappers import wrappers

    for _, layer in wrappers(model):
        for parameter in layer.parameters():
            deepspeed.zero.register_external_parameter(layer, parameter)


def wait() -> None:
    """Returns when all processes are here."""
    import torch

    if count() > 1 and torch.distributed.is_initialized():
        torch.distributed.barrier()


def everyones(thing: Any) -> list[Any]:
    """What each process has here, in their order."""
    import torch

    if count() == 1 or not torch.distributed.is_initialized():
        return [thing]
    found: list[Any] = [None] * count()
    torch.distributed.all_gather_object(found, thing)
    return found


def divided(work: Callable[[T], R], things: Sequence[T], model: Any) -> list[R]:
    """`work` of each of `things`, in their order, which the processes divide among themselves. Collective.

    Where they share the weights of `model` (FSDP2, ZeRO-3), each does all: they are needed for every forward.
    """
    import torch

    size = count() if torch.distributed.is_initialized() else 1
    if size == 1 or any(
        hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters()
    ):
        return [work(thing) for thing in things]
    found = everyones([work(thing) for thing in things[rank() :: size]])
    return [found[i % size][i // size] for i in range(len(things))]


def end() -> None:
    import torch

    if count() > 1 and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def one_voice() -> Iterator[None]:
    """Prints of the first process alone; of errors, that which comes first, whichever process has it.

    An error that all processes find (settings, data) is the first process's to say. One that a single process
    finds (a loss that is not finite) is said by that one: what the others meet then is only that it is gone.
    """
    if count() == 1:
        yield
        return
    out, err = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nothing:
        if not first():
            sys.stdout = sys.stderr = nothing
        try:
            yield
        except BaseException:
            said = _speaks()
            sys.stdout.flush()
            if not said:
                os._exit(1)
            sys.stdout, sys.stderr = out, err
            if not first():
                print(f"process {rank()} of {count()}:", file=err)
            raise
        finally:
            sys.stdout, sys.stderr = out, err


def _speaks() -> bool:
    """Whether this process's error is the one to be shown."""
    import torch

    if not torch.distributed.is_initialized():
        if not first():
            time.sleep(PATIENCE)  # the launcher ends us as soon as the first has failed
        return True
    with suppress(RuntimeError):  # the store's process is gone: it had spoken
        store: Any = torch.distributed.distributed_c10d._get_default_store()
        if sys.exc_info()[0] is not None and not first():
            time.sleep(0.5)  # what all find the first says
        return store.compare_set(SPOKEN, "", str(rank())) == str(rank()).encode()
    return first()
