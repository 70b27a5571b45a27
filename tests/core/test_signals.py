"""Ctrl-C and SIGTERM at every moment of a command: one message, the status that the first signal or the outcome
gives.

Each program below sends itself the signal at one known moment, so that nothing hangs on luck or on the
machine's pace.
"""

import os
import signal
import subprocess
import sys

import pytest

LINE = "\ncompassion-repro: interrupted; what is finished or saved is kept, the same command carries on\n"

# A program as the installer writes it, with a command that ends as told.
PROGRAM = """
import atexit, os, signal, sys, threading

def send(number={number}, kill=os.kill, process=os.getpid()):
    kill(process, number)

{before}
from compassion_repro.cli import __main__ as cli
from compassion_repro.core.errors import InputError

class Parser:
    def parse_args(self, words):
        return self
    def action(self, args):
        {act}

cli.build_parser = Parser
{after}
sys.exit(cli.main())
"""

INTERRUPT, REFUSE, SUCCEED = "send()", "raise InputError('wrong: mend it')", "return 0"
AT_EXIT = "atexit.register(send)"
IN_SHUTDOWN = """
class Late:
    def __del__(self, send=send):
        send()
late = Late()
"""
WHILE_PRINTING = """
class Stderr:
    def write(self, text, write=sys.stderr.write):
        send()
        return write(text)
    def flush(self):
        sys.__stderr__.flush()
sys.stderr = Stderr()
"""
WHILE_UNWINDING = """
outcome = cli._outcome
def _outcome(words):
    try:
        return outcome(words)
    finally:
        send()
cli._outcome = _outcome
"""
WHILE_IMPORTING = """
class Finder:
    def find_spec(self, name, *rest):
        if name == "compassion_repro.core.errors":
            send()
sys.meta_path.insert(0, Finder())
"""
IN_A_THREAD_LEFT_BEHIND = """
cli.LEAVE = 0.5
threading.Thread(target=threading.Event().wait).start()
"""


def program(folder, number=signal.SIGINT, act=SUCCEED, before="", after="", **options):
    "Run the program to its end."
    script = folder / "compassion-repro"
    script.write_text(PROGRAM.format(number=int(number), act=act, before=before, after=after))
    return subprocess.run([sys.executable, script], capture_output=True, text=True, **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    "again",
    [AT_EXIT, IN_SHUTDOWN, WHILE_PRINTING, WHILE_UNWINDING],
    ids=["at exit", "in shutdown", "while printing", "while unwinding"],
)
def test_a_second_signal_changes_neither_message_nor_status(tmp_path, number, again):
    done = program(tmp_path, number, INTERRUPT, after=again)
    assert (done.returncode, done.stderr) == (128 + number, LINE)


@pytest.mark.parametrize(
    "act, status, said",
    [(SUCCEED, 0, ""), (REFUSE, 2, "compassion-repro: wrong: mend it\n")],
    ids=["success", "refusal"],
)
def test_a_signal_after_the_outcome_does_not_change_it(tmp_path, act, status, said):
    done = program(tmp_path, act=act, after=AT_EXIT + IN_SHUTDOWN)
    assert (done.returncode, done.stderr) == (status, said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_while_the_libraries_are_imported(tmp_path, number):
    done = program(tmp_path, number, before=WHILE_IMPORTING)
    assert (done.returncode, done.stderr) == (128 + number, LINE)


def test_a_thread_that_does_not_end_cannot_hold_the_process(tmp_path):
    done = program(tmp_path, act=INTERRUPT, after=IN_A_THREAD_LEFT_BEHIND)
    assert (done.returncode, done.stderr) == (130, LINE)


def test_a_signal_that_the_parent_ignores_stays_ignored(tmp_path):
    ignoring = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)
    done = program(tmp_path, act=f"{INTERRUPT}; {SUCCEED}", preexec_fn=ignoring)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_import_leaves_the_handlers_of_a_program_alone(tmp_path):
    code = (
        "import signal; before = signal.getsignal(2), signal.getsignal(15); from compassion_repro import cli;"
        " cli.main(['claims', 'none']); assert (signal.getsignal(2), signal.getsignal(15)) == before"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=os.environ
    )
    assert done.returncode == 0, done.stderr


def test_a_fork_dies_of_sigterm_without_a_word(tmp_path):
    act = (
        "child = os.fork() or send(15, process=os.getpid()); status = os.waitpid(child, 0)[1]; return"
        " os.WTERMSIG(status)"
    )
    done = program(tmp_path, act=act)
    assert (done.returncode, done.stderr) == (15, "")


@pytest.mark.parametrize("status", [130, 143])
def test_an_interrupt_inside_a_string_of_code_does_not_change_the_status(tmp_path, status):
    (tmp_path / "ends.py").write_text(
        "import sys\n"
        "from compassion_repro.cli.__main__ import _leave\n"
        "try:\n    exec('raise KeyboardInterrupt')\n"
        "except KeyboardInterrupt:\n    pass\n"
        f"sys.exit(_leave({status}))\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-m", "ends"], env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == status


IN_TASKS = """
import asyncio, gc, signal
from compassion_repro.core.signals import raise_on_signal

async def struck():
    signal.raise_signal({number})

async def one():
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(struck())
        await asyncio.sleep(60)

async def wrapped():
    try:
        await one()
    except BaseException as error:
        raise BaseExceptionGroup("of a library", [error]) from None

async def failed():
    raise ValueError("of a library")

async def another_failed():
    asyncio.create_task(failed())
    await asyncio.sleep(0)
    await struck()

for task in (one, wrapped, another_failed):
    try:
        with raise_on_signal():
            asyncio.run(task())
    except KeyboardInterrupt as interrupt:
        assert interrupt.args == ({number},)
    else:
        raise AssertionError("it went on")
    gc.collect()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupt_in_a_task_is_not_reported_and_an_error_is(number):
    code = IN_TASKS.format(number=int(number))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ValueError: of a library") == 1, done.stderr
    assert "KeyboardInterrupt" not in done.stderr, done.stderr
