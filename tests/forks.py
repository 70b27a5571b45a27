"""Starts Pythons that have imported the libraries already: forks of one process, made in milliseconds.

Importing torch, transformers and inspect takes longer than most tests do anything. One process imports them, and
forks for each job: it has a single thread (OpenBLAS, which would start others, is held to one), and none of the
package's own modules is loaded by then. A fork goes on as a Python of its own would, and ends as one, but for
taking the modules apart, which takes seconds. A fork may ask for another one, through a socket: so a stage that
merges in a fresh process, which `fork_to_merge` sees to.
"""

import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMPORTED_ONCE = [
    "nbdev.test",
    "matplotlib_inline.backend_inline",
    "seaborn",
    "statsmodels.api",
    "inspect_evals.anima",
    "inspect_evals.moru",
    "inspect_evals._registry",
    "trl.trainer.grpo_trainer",
    "trl.trainer.sft_trainer",
    "peft.tuners.lora.bnb",
    "datasets",
    "scipy.io",
    "openai",
    "inspect_ai.agent",
    "inspect_ai.agent._acp.server",
    "inspect_ai.model._openai_responses",
    "inspect_ai.hooks",
    "markdown_it",
]


def fork_to_merge(plain, address: str):
    """`subprocess.run`, but that the Python which a stage starts to merge is a fork of the process that listens
    at `address`: as fresh as a new one, for no forward pass was made there.
    """
    import json
    import os
    import signal
    import socket
    import subprocess
    import sys
    import tempfile
    import time

    def run(words, *more, **options):
        if list(words[:3]) != [sys.executable, "-m", "compassion_repro.training.merging"]:
            return plain(words, *more, **options)
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as door:
            names = {name: os.path.join(folder, name) for name in ("stdout", "stderr", "status")}
            for name in ("stdout", "stderr"):
                open(names[name], "w").close()
            code = f"import runpy; runpy.run_module({words[2]!r}, run_name='__main__', alter_sys=True)"
            job = {"code": code, "words": list(words[3:]), "folder": os.getcwd(), **names}
            door.connect(address)
            door.sendall(json.dumps(job | {"environment": dict(os.environ)}).encode() + b"\n")
            pid = int(door.makefile().readline())
            try:
                while not os.path.exists(names["status"]):
                    time.sleep(0.02)
            except BaseException:
                os.kill(pid, signal.SIGKILL)
                raise
            status, stdout, stderr = (open(names[name]).read() for name in ("status", "stdout", "stderr"))
        return subprocess.CompletedProcess(words, int(status), stdout, stderr)

    return run


SERVER = (
    inspect.getsource(fork_to_merge)
    + """
import atexit, gc, importlib, json, os, select, socket, subprocess, sys, threading, traceback

out = os.dup(1)
os.dup2(2, 1)
jobs = sys.stdin.buffer.raw
door = socket.socket(socket.AF_UNIX)
door.bind(sys.argv[2])
door.listen(64)
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
sys.modules["inspect_ai.model"].get_model_info("none/none")  # reads its list of models
assert not [name for name in sys.modules if name.startswith("compassion_repro")]
assert threading.active_count() == 1
gc.freeze()
child, places, rest = None, {}, b""
while child != 0:
    ready = select.select([jobs, door], [], [], 0.02)[0]
    asked = []
    if jobs in ready:
        if not (read := os.read(jobs.fileno(), 65536)):
            os._exit(0)
        *lines, rest = (rest + read).split(b"\\n")
        asked += [(line, out) for line in lines]
    if door in ready:
        visitor = door.accept()[0]
        asked.append((visitor.makefile("rb").readline(), visitor.fileno()))
    for line, answer in asked:
        job = json.loads(line)
        if not (child := os.fork()):
            break
        places[child] = job["status"]
        os.write(answer, b"%d\\n" % child)
    while child != 0 and places and (ended := os.waitpid(-1, os.WNOHANG))[0]:
        place = places.pop(ended[0])
        with open(place + ".partial", "w") as file:
            file.write(str(os.waitstatus_to_exitcode(ended[1])))
        os.rename(place + ".partial", place)
os.close(out)
door.close()
visitor = None
subprocess.run = fork_to_merge(subprocess.run, sys.argv[2])
for number, (name, flags) in enumerate(
    [(os.devnull, os.O_RDONLY), (job["stdout"], os.O_WRONLY), (job["stderr"], os.O_WRONLY)]
):
    os.dup2(os.open(name, flags), number)
os.chdir(job["folder"])
os.environ.clear()
os.environ.update(job["environment"])
sys.argv = ["-c", *job["words"]]
status = 1
try:
    exec(job["code"], {"__name__": "__main__"})
    status = 0
except SystemExit as leave:
    status = leave.code if isinstance(leave.code, int) else int(leave.code is not None)
except BaseException:
    traceback.print_exc()
threading._shutdown()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
"""
)
# `python -m compassion_repro.cli`
COMMAND = "import runpy; runpy.run_module('compassion_repro.cli', run_name='__main__', alter_sys=True)"


class Job:
    "A fork at work, with what one uses of `subprocess.Popen`."

    def __init__(self, pid: int, folder: Path):
        self.pid, self.folder, self.returncode = pid, folder, None

    def poll(self) -> int | None:
        status = self.folder / "status"
        if self.returncode is None and status.exists():
            self.returncode = int(status.read_text())
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or float("inf"))
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"not done after {timeout} s")
            time.sleep(0.02)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        "Wait for its end; returns what it printed on stdout and on stderr."
        self.wait(timeout)
        return tuple(
            (self.folder / name).read_text(encoding="utf-8", errors="replace")
            for name in ("stdout", "stderr")
        )

    def send_signal(self, number: int):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Forks:
    "The process that forks; it is started by the first job."

    def __init__(
        self,
        **environment: str,  # variables that the libraries read when they are imported
    ):
        self.environment = environment
        self.owner, self.process, self.count = os.getpid(), None, 0
        self.folder = Path(tempfile.mkdtemp(prefix="forks-"))
        self.address = str(self.folder / "door")

    def _start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, json.dumps(IMPORTED_ONCE), self.address],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "log").open("w"),
            env={"OMP_NUM_THREADS": "2", **os.environ, **self.environment, "OPENBLAS_NUM_THREADS": "1"},
        )

    def merge_instead(self, plain):
        "`plain`, which is `subprocess.run`, as `fork_to_merge` has it; nothing is started before it is needed."

        def run(words, *more, **options):
            if "compassion_repro.training.merging" in words and self.process is None:
                self.start("", []).wait()
            return fork_to_merge(plain, self.address)(words, *more, **options)

        return run

    def start(
        self,
        code: str,  # what is executed
        words: list[str],  # its `sys.argv[1:]`
        folder: str | Path = ".",  # it works in
        environment: dict | None = None,  # its environment, whole; default: that of this process
    ) -> Job:
        "Execute code in a fork."
        if self.process is None:
            self._start()
        self.count += 1
        place = self.folder / str(self.count)
        place.mkdir()
        names = {name: str(place / name) for name in ("stdout", "stderr", "status")}
        for name in ("stdout", "stderr"):
            (place / name).touch()
        job = {"code": code, "words": words, "folder": os.path.abspath(folder), **names}
        job["environment"] = dict(os.environ if environment is None else environment)
        self.process.stdin.write(json.dumps(job).encode() + b"\n")
        self.process.stdin.flush()
        pid = self.process.stdout.readline()
        assert pid, f"the process that forks has ended\n{(self.folder / 'log').read_text()[-6000:]}"
        return Job(int(pid), place)

    def close(self):
        if os.getpid() != self.owner:
            return  # a fork of the process that made it
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
