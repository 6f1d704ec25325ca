"""Commands that start at once: a process that has imported everything forks for each, so that pages may call `chunkft` often.

Importing torch, transformers and OR-Tools takes 5 CPU seconds, most of them more than what the commands of a page do with a tiny model. A
command is started with the arguments, directory, environment and the three streams of who asks; signals to it are handed on, and its exit
code comes back.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from docs.building.pages import ROOT

COMMANDS = ("chunkft", "run-page")

# it imports next to nothing, in the isolated mode of Python, and so takes 30 ms
_CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({path!r})
streams = array.array("i", [0, 1, 2])
server.sendmsg([b"+"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
asked = {{"command": {name!r}, "arguments": sys.argv[1:], "directory": os.getcwd(), "environment": dict(os.environ)}}
with server.makefile("rw") as lines:
    print(json.dumps(asked), file=lines, flush=True)
    pid = int(lines.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    code = int(lines.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@contextlib.contextmanager
def warm_commands(directory: Path) -> Iterator[Path]:
    """A directory inside `directory` with `COMMANDS`, which work until this block ends."""
    commands, address = directory / "bin", directory / "socket"
    commands.mkdir()
    for name in COMMANDS:
        script = commands / name
        script.write_text(_CLIENT.format(python=sys.executable, path=str(address), name=name))
        script.chmod(0o755)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    with (directory / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, "-m", __name__, str(address)], env=environment, stdout=log, stderr=log)
    try:
        while not address.exists():
            if server.poll() is not None:
                raise RuntimeError(f"the process that starts commands ended:\n{(directory / 'log').read_text()}")
            time.sleep(0.05)
        yield commands
    finally:
        server.terminate()
        server.wait()


def serve(address: str) -> int:
    """The exit code of the process that returns: of a forked one, that of its command."""
    from chunkft_compile.cli import main as chunkft  # before the socket is there: whoever finds it finds a warm process
    from docs.building.running import main as run_page

    for module in ("transformers.models.llama.modeling_llama", "transformers.trainer"):  # transformers imports them when first asked for
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # collections in forked processes would write to all objects that are shared with this one, which copies their pages
    mains: dict[str, Callable[[], int | None]] = {"chunkft": chunkft, "run-page": run_page}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.early")
        listener.listen(16)
        os.rename(f"{address}.early", address)
        listener.settimeout(1)
        parent = os.getppid()
        while os.getppid() == parent:  # a killed parent leaves nothing behind
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            connection.setblocking(True)
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who answer
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                return _answer(connection, mains)
            connection.close()
    return 0


def _answer(connection: socket.socket, mains: dict[str, Callable[[], int | None]]) -> int:
    """In the process that answers one client: fork once more, and tell how that ended."""
    _, streams, _, _ = socket.recv_fds(connection, 1, 3)
    with connection.makefile("rw") as lines:
        asked = json.loads(lines.readline())
        pid = os.fork()
        if pid:
            for stream in streams:
                os.close(stream)
            print(pid, file=lines, flush=True)
            _, status, used = os.wait4(pid, 0)
            # into the log of the server: what pages cost, since these processes are no children of who asks
            print(f"{used.ru_utime + used.ru_stime:6.1f} CPU s: {asked['command']} {' '.join(asked['arguments'])}", flush=True)
            with contextlib.suppress(BrokenPipeError):  # the client was killed
                print(os.waitstatus_to_exitcode(status), file=lines, flush=True)
            os._exit(0)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(asked["directory"])
    os.environ.clear()
    os.environ.update(asked["environment"])
    sys.argv = [asked["command"], *asked["arguments"]]
    return mains[asked["command"]]() or 0


if __name__ == "__main__":
    sys.exit(serve(sys.argv[1]))
