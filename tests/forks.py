"""Starts Pythons that have imported the libraries already: forks of one process, made in milliseconds.

Importing torch, transformers and inspect takes longer than most tests do anything. One process imports them, and
forks for each job: it has a single thread (OpenBLAS, which would start others, is held to one), and none of the
package's own modules is loaded by then. A fork goes on as a Python of its own would, and ends as one, but for
taking the modules apart, which takes seconds.
"""

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
    "inspect_ai.hooks",
    "markdown_it",
]

SERVER = """
import atexit, gc, importlib, json, os, select, sys, threading, traceback

out = os.dup(1)
os.dup2(2, 1)
jobs = sys.stdin.buffer.raw
for name in json.loads(sys.argv[1]):
    importlib.import_module(name)
sys.modules["inspect_ai.model"].get_model_info("none/none")  # reads its list of models
assert not [name for name in sys.modules if name.startswith("compassion_repro")]
assert threading.active_count() == 1
gc.freeze()
child, places, rest = None, {}, b""
while child != 0:
    if select.select([jobs], [], [], 0.02)[0]:
        if not (read := os.read(jobs.fileno(), 65536)):
            os._exit(0)
        rest += read
    while child != 0 and b"\\n" in rest:
        line, _, rest = rest.partition(b"\\n")
        job = json.loads(line)
        if child := os.fork():
            places[child] = job["status"]
            os.write(out, b"%d\\n" % child)
    while child != 0 and places and (ended := os.waitpid(-1, os.WNOHANG))[0]:
        place = places.pop(ended[0])
        with open(place + ".partial", "w") as file:
            file.write(str(os.waitstatus_to_exitcode(ended[1])))
        os.rename(place + ".partial", place)
os.close(out)
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

    def _start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, json.dumps(IMPORTED_ONCE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self.folder / "log").open("w"),
            env={"OMP_NUM_THREADS": "2", **os.environ, **self.environment, "OPENBLAS_NUM_THREADS": "1"},
        )

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
