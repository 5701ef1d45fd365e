"""Runs a function in several processes that talk over gloo, as torchrun would start them."""

import multiprocessing
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.multiprocessing.spawn import ProcessException

# Imported once, by a server that all processes are forked from.
_IMPORTS = ["transformers.trainer", "peft", "unimoe.training.stages"]


def run(function: Callable, *arguments: Any, processes: int = 2, timeout: float = 300.0) -> None:
    """Calls `function(*arguments)` in every process; it must stand at the top of a module.

    Raises:
        AssertionError: a process failed, or not all of them were done after `timeout` seconds.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(_IMPORTS)
    # Port 0: the system picks a free one, and it is taken from the start.
    store = distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = torch.multiprocessing.start_processes(
        _begin,
        (processes, store.port, function, arguments),
        nprocs=processes,
        join=False,
        start_method="forkserver",
    )
    end = time.monotonic() + timeout
    try:
        while not context.join(timeout=1.0):
            assert time.monotonic() < end, f"not done after {timeout} s"
    except ProcessException as error:
        raise AssertionError(str(error)) from None
    finally:
        for process in context.processes:
            process.kill()


def _begin(rank: int, processes: int, port: int, function: Callable, arguments: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # The store exists already, as under torchrun.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", timeout=timedelta(seconds=300))
    function(*arguments)
    distributed.barrier()
    distributed.destroy_process_group()
