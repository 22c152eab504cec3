"""Runs Python programs as processes of their own that need not import PyTorch and the package again."""

import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import NoReturn

import torch

ROOT = Path(__file__).resolve().parents[1]


def run_python(program: Path | str, *arguments: object, processes: int = 1, timeout: int = 280, **environment: str):
    """Runs a script or a module as `python` does, or with several processes as torchrun does.

    They are forks of this process, or new interpreters where it has used a GPU, which does not survive a fork.
    Returns a `CompletedProcess` with what all of them wrote.
    """
    arguments = [str(argument) for argument in arguments]
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    if torch.cuda.is_initialized():
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = ["-m", program] if isinstance(program, str) else [str(program)]
        command = [sys.executable, *(launcher if processes > 1 else []), *command, *arguments]
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=timeout
        )
    ranks = [{}]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
        ranks = [
            meeting | {"RANK": f"{i}", "LOCAL_RANK": f"{i}", "WORLD_SIZE": f"{processes}"} for i in range(processes)
        ]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        children = []
        for rank in ranks:
            child = os.fork()
            if child == 0:
                signal.alarm(timeout)
                os.dup2(out.fileno(), 1)
                os.dup2(errors.fileno(), 2)
                _become(program, arguments, environment | rank)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        out.seek(0)
        errors.seek(0)
        code = next((code for code in codes if code), 0)
        return subprocess.CompletedProcess([str(program), *arguments], code, out.read(), errors.read())


def _become(program: Path | str, arguments: list[str], environment: dict[str, str]) -> NoReturn:
    code = 1
    try:
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        os.environ.update(environment)
        # A fork's first call of this makes PyTorch's thread pool anew, which threads that meet there at once break.
        torch.set_num_threads(1)
        sys.argv = [str(program), *arguments]
        if isinstance(program, str):
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(program.parent))
            runpy.run_path(str(program), run_name="__main__")
        code = 0
    except SystemExit as done:
        code = done.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
