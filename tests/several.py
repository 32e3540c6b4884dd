"""Several processes of one run, forked by a test at once: without a launcher, and without importing anything anew.

They end with the process that has forked them, also if that is killed.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

from forking import end_with


def together(count: int, function: Callable[..., Any], *arguments: Any) -> int:
    """Call `function(rank, *arguments)` in so many forked processes that know each other; 0 if none failed.

    Call it in a process that has run no backward pass yet, such as one that `forking.start` has made.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pids, parent = [], os.getpid()
    for rank in range(count):
        pid = os.fork()
        if pid == 0:
            end_with(parent)
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(store.port), TORCHELASTIC_USE_AGENT_STORE="True",
            )  # fmt: skip
            code = 1
            try:
                code = function(rank, *arguments) or 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return int(any(codes))
