"""Hostile programs in the jail: each contained at each level, the host unharmed, the next program unaffected.

Where a test says that something is denied, a control runs the same program without walls and must succeed, so
that no test passes because the attempt was broken. Started by root, the whole file runs once more as an
ordinary user.
"""

import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psutil
import pytest

from compassion_repro.bench.cpu import benchmark
from compassion_repro.core.errors import InputError
from compassion_repro.sandbox import jail as sandbox
from compassion_repro.sandbox import supervisor, walls
from compassion_repro.sandbox.jail import LEVELS, probe

# what is not about the time limit has time enough on a busy machine
run_code, run_many = partial(sandbox.run_code, timeout_s=60), partial(sandbox.run_many, timeout_s=60)

ROOT = Path(__file__).resolve().parents[2]
ADD, ADD_TESTS = "def add(x, y): return x + y", "assert add(2, 3) == 5\nassert add(0, 0) == 0"


@pytest.fixture(params=LEVELS[:-1])
def where(request) -> str:
    "Each level that this machine offers; the others are skipped with the reason."
    reason = probe(request.param)
    if reason:
        pytest.skip(f"{request.param} does not work here: {reason}")
    return request.param


@pytest.fixture(scope="module")
def host(marked_jails):
    "Things of the host's that a program might reach for: a file, a folder, a process, two servers."
    place = Path(tempfile.mkdtemp(prefix="host-"))
    place.chmod(0o755)
    secret, folder = place / "secret.txt", place / "open"
    secret.write_text("the host's own")
    secret.chmod(0o666)
    folder.mkdir()
    folder.chmod(0o777)
    victim = subprocess.Popen(["sleep", "600"], env={"HOST_TOKEN": "s3cret"})
    server, local = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)
    local.bind(f"\0jail-test-{os.getpid()}")
    local.listen()

    def unharmed():
        assert victim.poll() is None, "the host's process was ended"
        assert (
            secret.read_text() == "the host's own"
            and secret.stat().st_mode & 0o777 == 0o666
            and not list(folder.iterdir())
        )

    yield (
        {
            "file": str(secret),
            "folder": str(folder),
            "victim": victim.pid,
            "host": os.getpid(),
            "port": server.getsockname()[1],
            "unix": f"\0jail-test-{os.getpid()}",
        },
        unharmed,
    )
    unharmed()
    victim.kill()
    victim.wait()
    server.close()
    local.close()
    shutil.rmtree(place)


# in the command line of each process of our jails, so that other runs on this machine do not disturb
MARK = f"# test run {os.getpid()}"


@pytest.fixture(autouse=True, scope="module")
def marked_jails(tmp_path_factory):
    """Jails that can be told from all others: by a mark in their command line, and by their own folder for
    files.
    """
    tmp_path_factory.getbasetemp()
    folder = Path(tempfile.mkdtemp(prefix="test-sandbox-"))
    folder.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "BOOT", f"{supervisor.BOOT}\n{MARK}")
        patch.setattr(tempfile, "tempdir", str(folder))
        yield
    folder.rmdir()  # fails if anything was left


def command_line(process: str) -> bytes:
    try:
        with open(f"/proc/{process}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def traces() -> dict:
    """What a program could leave behind: processes (wherever they were reparented to), files, mounts, open
    descriptors.
    """
    jailed = {
        process
        for process in os.listdir("/proc")
        if process.isdigit() and MARK.encode() in command_line(process)
    }
    names = {path.name for path in Path(tempfile.gettempdir()).iterdir() if path.name.startswith("jail-")} | {
        path.name for path in Path("/dev/shm").iterdir() if path.name.startswith("left-")
    }
    return {
        "processes": jailed,
        "files": names,
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }


@pytest.fixture(autouse=True)
def nothing_left(host, marked_jails):
    "After each test the host is as it was."
    descriptors, mounts = len(os.listdir("/proc/self/fd")), Path("/proc/self/mountinfo").read_text()
    yield
    assert traces() == {"processes": set(), "files": set(), "mounts": mounts, "descriptors": descriptors}
    host[1]()


# what a program would say at its end, said to every descriptor it may have
FORGED = (
    "import os\nfor number in range(3, 64):\n    try: os.write(number, (34).to_bytes(8, 'big') + b'L' +"
    " (25).to_bytes(8, 'big') + b'S' + (5).to_bytes(8, 'big') + b'ended' + b'S' + (2).to_bytes(8, 'big') +"
    " b'ok')\n    except OSError: pass\n"
)

# name -> program, tests, the statuses that count as contained
HOSTILE = {
    "infinite loop": ("while True: pass", "", "timeout"),
    "infinite loop when called": ("def add(x, y):\n    while True: pass", ADD_TESTS, "timeout"),
    "a loop that swallows everything": (
        (
            "def add(x, y):\n    while True:\n        try:\n            while True: pass\n        except"
            " BaseException: pass"
        ),
        ADD_TESTS,
        "timeout",
    ),
    "sleep": ("import time\ntime.sleep(600)", "", "timeout"),
    "a loop inside C": ("sum(range(10**15))", "", "timeout"),
    "all signals ignored": (
        (
            "import signal\nfor number in range(1, 65):\n    try: signal.signal(number, signal.SIG_IGN)\n   "
            " except (OSError, ValueError): pass\nwhile True: pass"
        ),
        "",
        "timeout",
    ),
    "stops itself": ("import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)", "", "failed"),
    "fork bomb": ("import os\nwhile True: os.fork()", "", "failed"),
    "patient fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
        "",
        "timeout",
    ),
    "process bomb": (
        "import subprocess, sys\nwhile True: subprocess.Popen([sys.executable, '-c', 'while True: pass'])",
        "",
        "failed",
    ),
    "thread bomb": (
        "import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(600,)).start()",
        "",
        "failed memory timeout killed",
    ),
    "memory bomb": ("x = bytearray(10**11)", "", "memory"),
    "slow memory bomb": ("x = []\nwhile True: x.append('y' * 10**6 + str(len(x)))", "", "memory"),
    "memory bomb when called": ("def add(x, y): return [0] * 10**10", ADD_TESTS, "memory"),
    "memory bomb for the judge": (
        "def add(x, y):\n    while True: yield 'x' * 10**7",
        "assert list(add(1, 2)) == []",
        "memory timeout",
    ),
    "memory mapped twice": (
        "import mmap\nx = [mmap.mmap(-1, 2**28) for _ in range(64)]",
        "",
        "failed memory",
    ),
    "endless output": ("while True: print('x' * 10**6)", "", "killed timeout"),
    "endless errors": ("import sys\nwhile True: sys.stderr.write('x' * 10**6)", "", "killed timeout"),
    "huge file": ("with open('huge', 'wb') as file:\n    while True: file.write(b'x' * 10**6)", "", "failed"),
    "many files": (
        "n = 0\nwhile True:\n    n += 1\n    open(f'file{n}', 'wb').write(b'x' * 10**6)",
        "",
        "failed killed",
    ),
    "endless empty files": (
        "n = 0\nwhile True:\n    n += 1\n    open(f'file{n}', 'wb').close()",
        "",
        "failed killed timeout",
    ),
    "deep folders": (
        "import os\nfor _ in range(3000): os.mkdir('d'); os.chdir('d')\nos.mkdir('closed', 0)",
        "",
        "ok",
    ),
    "deep recursion": ("def f(): return f()\nf()", "", "failed"),
    "bottomless recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
        "",
        "failed memory killed timeout",
    ),
    "bottomless recursion in C": (
        "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
        "",
        "failed memory killed",
    ),
    "crash in C": ("import ctypes\nctypes.string_at(0)", "", "killed"),
    "crash in C when called": (
        "import ctypes\ndef add(x, y): return ctypes.string_at(0)",
        ADD_TESTS,
        "killed",
    ),
    "abort": ("import os\nos.abort()", "", "killed"),
    "null byte": ("x = 1\0", "", "syntax"),
    "half a character": ("x = '\ud800'", "", "syntax"),
    "brackets without end": ("(" * 10**5, "", "syntax memory killed"),
    "a source of 5 MB that is one word": ("x = '" + "y" * 5_000_000 + "'", "", "ok"),
    "a source of 5 MB in lines": ("x = 1\n" * 833_334, "", "ok memory timeout"),
    "exit": (ADD + "\nexit(0)", ADD_TESTS, "failed"),
    "exit without tests": ("import sys\nsys.exit(0)", "", "failed"),
    "exit past everything": ("import os\nos._exit(0)", ADD_TESTS, "failed"),
    "exit past everything without tests": ("import os\nos._exit(0)", "", "failed"),
    "exit when called": ("def add(x, y): raise SystemExit(0)", ADD_TESTS, "failed"),
    "exit past everything when called": ("import os\ndef add(x, y): os._exit(0)", ADD_TESTS, "failed"),
    "exit past everything inside the tests' own try": (
        "import os\ndef add(x, y): os._exit(0)",
        "try: add(1, 2)\nexcept BaseException: pass",
        "failed",
    ),
    "claims its end and leaves": (FORGED + "os._exit(0)", "", "failed"),
    "claims its end and waits": (FORGED + "import time\ntime.sleep(600)", "", "timeout"),
    "system calls of another kind": (
        (
            "import ctypes, mmap\npage = mmap.mmap(-1, 4096,"
            " prot=7)\npage.write(bytes.fromhex('b814000000cd80c3'))\nctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))()\nwhile"
            " True: pass"
        ),
        "",
        "killed failed memory",
    ),
    "system calls by their x32 numbers": (
        (
            "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\nassert libc.syscall(0x40000000 | 57) =="
            " -1\nraise OSError"
        ),
        "",
        "failed killed",
    ),
    "hang up": ("import os\nos.closerange(0, 64)", ADD_TESTS, "failed killed"),
    "hang up when called": ("import os\ndef add(x, y): os.closerange(0, 64)", ADD_TESTS, "failed killed"),
}


@pytest.fixture(scope="module")
def batch(marked_jails):
    """batch(table, where, run): `run` for each entry of a table, side by side in one jail and once, to be
    asserted one by one.
    """
    found = {}

    def results(table, where, run):
        if (id(table), where) not in found:
            with sandbox.Jail(where) as jail, ThreadPoolExecutor(8) as pool:
                in_jail = lambda code, tests, timeout_s=40: sandbox._run_in(
                    jail, (code, tests), timeout_s, 512
                )
                found[id(table), where] = dict(
                    zip(table, pool.map(lambda name: run(*table[name], in_jail), table))
                )
        return found[id(table), where]

    return results


def run_hostile(code, tests, allowed, in_jail):
    "A hostile program, then a healthy one in the same jail."
    return in_jail(code, tests, 0.5 if "timeout" in allowed else 40), in_jail(ADD, ADD_TESTS)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program(name, where, batch):
    result, following = batch(HOSTILE, where, run_hostile)[name]
    assert result.status in HOSTILE[name][2].split(), result
    assert result.passed is (result.status == "ok")
    # on a busy machine
    assert (
        len(result.stdout) <= sandbox.OUTPUT_LIMIT
        and len(result.stderr) <= sandbox.OUTPUT_LIMIT + 200
        and result.seconds < 60
    )
    assert following.passed, "the next program is affected"


# wrong programs that try to pass: none of them adds
CHEATS = {
    "prints the word": ("print('ok passed success verdict ready')\ndef add(x, y): return 0",),
    "writes a verdict everywhere": (
        (
            "import os\nfor number in range(64):\n    for line in (b'ready\\nverdict ok\\n', b'verdict 0"
            " ok\\nended judged 0 0\\n'):\n        try: os.write(number, line)\n        except OSError:"
            " pass\ndef add(x, y): return 0"
        ),
    ),
    "an object that equals everything": (
        (
            "class Any:\n    __eq__ = __ne__ = __lt__ = __gt__ = __bool__ = __contains__ = lambda *rest:"
            " True\n    __hash__ = lambda self: 5\ndef add(x, y): return Any()"
        ),
    ),
    "a number that equals everything": (
        (
            "class Any(int):\n    __eq__ = lambda *rest: True\n    __hash__ = int.__hash__\ndef add(x, y):"
            " return Any(0)"
        ),
    ),
    "a mock that equals everything": ("from unittest.mock import ANY\ndef add(x, y): return ANY",),
    "no AssertionError": (
        (
            "import builtins\nclass Quiet(BaseException):\n    def __new__(*rest): raise"
            " SystemExit(0)\nbuiltins.AssertionError = Quiet\ndef add(x, y): return 0"
        ),
    ),
    "built-in functions replaced": (
        (
            "import builtins\nbuiltins.exec = builtins.eval = builtins.compile = builtins.isinstance = lambda"
            " *rest, **named: True\ndef add(x, y): return 0"
        ),
    ),
    "harness functions replaced": (
        (
            "import sys\nframe = sys._getframe()\nwhile frame:\n    for name in ('judge', 'send', 'receive',"
            " 'answer', 'execute', 'codec'): frame.f_globals[name] = lambda *rest: 'ok'\n    frame ="
            " frame.f_back\ndef add(x, y): return 0"
        ),
    ),
    "looks for the secret": (
        (
            "import gc, re, sys\nfound = set()\nfor thing in gc.get_objects():\n    try: found |="
            " set(re.findall(r'[0-9a-f]{32}', repr(thing)[:100000]))\n    except BaseException: pass\nimport"
            " os\nfor secret in found:\n    for number in range(64):\n        try: os.write(number, f'verdict"
            " {secret} ok\\n'.encode())\n        except OSError: pass\ndef add(x, y): return 0"
        ),
    ),
    "looks for the tests": (
        (
            "import gc\ndef add(x, y):\n    for thing in gc.get_objects():\n        if 'assert add' in"
            " str(thing) and 'gc.get_objects' not in str(thing): return x + y\n    return 0"
        ),
    ),
    "traces": (
        (
            "import sys\ndef skip(frame, event, rest):\n    frame.f_trace_lines = False\n    return"
            " skip\nsys.settrace(skip)\nsys.setprofile(lambda *rest: None)\ndef add(x, y): return 0"
        ),
    ),
    "at exit": ("import atexit, os\natexit.register(lambda: os._exit(0))\ndef add(x, y): return 0",),
    "kills the judge": (
        (
            "import os, signal\ndef add(x, y):\n    for number in [-1, 0, *range(1, 300), os.getppid()]:\n   "
            "     for action in (os.kill, os.killpg):\n            try: action(number, signal.SIGKILL)\n     "
            "       except OSError: pass\n    return 0"
        ),
    ),
    "writes into the judge": (
        (
            "import ctypes, os\ndef add(x, y):\n    libc = ctypes.CDLL(None)\n    for number in [*range(1,"
            " 20), *range(os.getppid(), os.getppid() + 5)]:\n        assert libc.ptrace(16, number, 0, 0) =="
            " -1\n        for name in ('mem', 'fd/0'):\n            try: open(f'/proc/{number}/{name}',"
            " 'r+b')\n            except OSError: continue\n            raise RuntimeError('opened')\n   "
            " return 0"
        ),
    ),
    "claims to have ended and answers itself": (
        (
            "import os\nfor number in range(3, 64):\n    try: os.write(number, b'\\0' * 7 + b'\\x20L' +"
            " b'\\0' * 7 + b'\\x17S' + b'\\0' * 7 + b'\\x05endedS' + b'\\0' * 7 + b'\\x02ok')\n    except"
            " OSError: pass\nos._exit(0)"
        ),
    ),
    "floods the pipe with nonsense": (
        (
            "import os\nfor number in range(3, 64):\n    try: os.write(number, b'\\xff' * 100000)\n    except"
            " OSError: pass\ndef add(x, y): return 0"
        ),
    ),
    "claims its end before it has defined anything": (FORGED + "def add(x, y): return 0",),
    "keeps the answers of one call for the next": (
        "seen = []\ndef add(x, y):\n    seen.append((x, y))\n    return len(seen) * 5 - 5",
    ),
    "says that a stand-in is one of the judge's own": (
        (
            "import sys\nframe = sys._getframe()\nwhile 'send' not in frame.f_locals: frame ="
            " frame.f_back\nframe.f_locals['send']('ended', 'ok')\ndef add(x, y): return type"
        ),
    ),
    "raises what ends the judge": (
        (
            "def add(x, y):\n    for kind in (SystemExit, KeyboardInterrupt, GeneratorExit, EOFError): raise"
            " kind(0)"
        ),
    ),
    "speaks the judge's part": (
        (
            "import sys\nframe = sys._getframe()\nwhile 'receive' not in frame.f_locals: frame ="
            " frame.f_back\nsend = frame.f_locals['send']\nfor words in (('ended', 'ok'), ('value', 5,"
            " [None]), ('value', True, []), ('value', ['add'], [])) * 3: send(*words)\ndef add(x, y):"
            " return 0"
        ),
    ),
    "changes the arguments": ("def add(x, y):\n    globals()['add'] = lambda *rest: None",),
}


def run_cheat(code, in_jail):
    "A cheat, then a good program in the same jail."
    return in_jail(code, ADD_TESTS), in_jail(ADD, ADD_TESTS)


@pytest.mark.parametrize("name", CHEATS)
def test_no_cheat_passes(name, where, batch):
    result, following = batch(CHEATS, where, run_cheat)[name]
    assert result.passed is False and result.status in ("failed", "killed"), result
    assert following.passed, "the next program is affected"


@pytest.mark.parametrize(
    "code, tests",
    [
        ("def abs(x): return 0\ndef half(x): return 7", "assert abs(half(3) - 1.5) < 0.01"),
        (
            "all = any = isinstance = len = sorted = set = lambda *rest: True\ndef half(x): return 7",
            "assert all(half(n) == n / 2 for n in range(3))",
        ),
        (
            (
                "class Near:\n    __sub__ = __rsub__ = __abs__ = __round__ = lambda *rest: 0.0\ndef half(x):"
                " return Near()"
            ),
            "assert abs(half(3) - 1.5) < 0.01",
        ),
        (
            (
                "class Near:\n    __sub__ = __rsub__ = lambda self, other: self\n    __abs__ = __lt__ ="
                " lambda *rest: True\ndef half(x): return Near()"
            ),
            "assert abs(half(3) - 1.5) < 0.01",
        ),
        (
            "class All(list):\n    __contains__ = __eq__ = lambda *rest: True\ndef halves(x): return All()",
            "assert 1.5 in halves([3])",
        ),
        (
            "class All(list):\n    __eq__ = lambda *rest: True\ndef halves(x): return All()",
            "assert halves([3]) == [1.5]",
        ),
        ("def half(x): raise StopIteration", "assert all(map(lambda n: half(n) == n / 2, range(3)))"),
        ("x = 1", "assert sum([1]) == 1"),
        ("def append(x): pass", "x = []\nx.append(1)\nassert sum(x) == 1"),
        (
            "import math\nmath.isclose = lambda *rest, **named: True\ndef half(x): return 7",
            "assert math.isclose(half(3), 1.5)",
        ),
    ],
)
def test_weak_comparisons_cannot_be_bent(code, tests, where):
    assert run_code(code, tests, using=where).status == "failed"


HONEST = {
    "exceptions": (
        (
            "class Empty(LookupError):\n    pass\ndef pop(x):\n    if not x: raise Empty('nothing there')\n  "
            "  return x.pop()"
        ),
        (
            "try: pop([])\nexcept Empty as error: assert str(error) == 'nothing there'\nelse: assert"
            " False\ntry: pop([])\nexcept LookupError: pass\nx = [1, 2]\nassert pop(x) == 2 and x == [1]"
        ),
    ),
    "built-in errors": (
        "def half(x): return x / 0",
        "try: half(1)\nexcept ZeroDivisionError: pass\nelse: assert False",
    ),
    "classes": (
        (
            "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x):"
            " self.items.append(x)\n    def __len__(self): return len(self.items)\n    def __getitem__(self,"
            " n): return self.items[n]"
        ),
        (
            "s = Stack()\ns.push(3)\ns.push('a')\nassert len(s) == 2 and s[1] == 'a' and s.items == [3, 'a']"
            " and list(s) == [3, 'a']\nassert isinstance(s, Stack) and not isinstance(3, Stack)"
        ),
    ),
    "vectors": (
        (
            "class V:\n    def __init__(self, x): self.x = x\n    def __add__(self, other): return V(self.x +"
            " other.x)\n    def __mul__(self, n): return V(self.x * n)\n    def __eq__(self, other): return"
            " self.x == other.x"
        ),
        "assert V(1) + V(2) == V(3) and (V(2) * 3).x == 6 and not V(1) == V(2)",
    ),
    "dataclasses, enums, named tuples": (
        (
            "from dataclasses import dataclass\nfrom enum import IntEnum\nfrom collections import"
            " namedtuple\n@dataclass\nclass D:\n    x: int\nclass E(IntEnum):\n    A = 1\nP = namedtuple('P',"
            " 'x y')\ndef f(): return P(1, D(2))"
        ),
        (
            "assert E.A == 1 and f().y.x == 2 and f().x == 1 and D(2) == D(2) and P(1, 2) == (1, 2) and"
            " isinstance(P(1, 2), tuple)"
        ),
    ),
    "callbacks and lambdas": (
        "def apply(f, xs): return [f(x) for x in xs]\ndef make(n): return lambda x: x + n",
        (
            "seen = []\nassert apply(lambda x: x * 2, [1, 2]) == [2, 4] and make(3)(4) =="
            " 7\napply(seen.append, [1, 2])\nassert seen == [1, 2] and apply(str, [1]) == ['1'] and"
            " apply(make(1), [1]) == [2]"
        ),
    ),
    "generators": (
        "def count(n):\n    for k in range(n): yield k",
        "assert list(count(3)) == [0, 1, 2] and sum(count(4)) == 6 and next(count(1)) == 0",
    ),
    "errors with arguments": (
        (
            "class Bad(Exception): pass\ndef f(x): raise x('a', 1)\ndef g(): raise Bad('b', 2)\ndef h(x):"
            " return {}[x]"
        ),
        (
            "for kind in (KeyError, ValueError):\n    try: f(kind)\n    except kind as error: assert"
            " error.args == ('a', 1)\n    else: assert False\ntry: g()\nexcept Bad as error: assert"
            " error.args == ('b', 2)\ntry: h('x')\nexcept KeyError as error: assert str(error) =="
            " \"'x'\"\ntry: open('/nothing')\nexcept OSError: pass"
        ),
    ),
    "imported as a module": (
        ADD,
        "import solution\nfrom solution import add as plus\nassert plus(1, 2) == 3 == solution.add(2, 1)",
    ),
    "a check function": (ADD, "def check(candidate):\n    assert candidate(2, 3) == 5\ncheck(add)"),
    "a built-in name is the task": ("def sum(x): return 42", "assert sum([1]) == 42"),
    "main is not run beside tests": (ADD + "\nif __name__ == '__main__': add(input(), 1)", ADD_TESTS),
    "modules of the program": (
        "import math\ndef root(x): return math.sqrt(x)",
        "assert math.isclose(root(2) ** 2, 2)",
    ),
    "files of its own": (
        (
            "import os\ndef f():\n    os.mkdir('sub')\n    with open('sub/x.txt', 'w') as file:"
            " file.write('hello')\n    os.rename('sub/x.txt', 'y.txt')\n    return open('y.txt').read(),"
            " sorted(os.listdir('.'))"
        ),
        "assert f() == ('hello', ['sub', 'y.txt'])",
    ),
    "threads and asyncio": (
        (
            "import asyncio, concurrent.futures\nasync def later(x): return x\ndef f():\n    with"
            " concurrent.futures.ThreadPoolExecutor(4) as pool: return list(pool.map(lambda x: x * x,"
            " range(4))), asyncio.run(later(3))"
        ),
        "assert f() == ([0, 1, 4, 9], 3)",
    ),
    "much of the library": (
        (
            "import json, re, decimal, datetime, random, hashlib, sqlite3, zlib, statistics, typing,"
            " functools, itertools, heapq, tempfile, unittest, ssl, lzma, bz2\ndef f(): return"
            " json.dumps({'a': [1, None]}), hashlib.sha256(b'').hexdigest()[:4], zlib.crc32(b'x')"
        ),
        "assert f() == ('{\"a\": [1, null]}', 'e3b0', 2363233923)",
    ),
    "threads that outlive the program": (
        (
            "import threading\ndef spin():\n    while True: pass\nthreading.Thread(target=spin).start()\ndef"
            " f(): return 1"
        ),
        "assert f() == 1",
    ),
    "invalid UTF-8 printed": (
        "import sys\nsys.stdout.buffer.write(b'\\xff\\xfe\\0')\ndef f(): return b'\\xff', '\\ud800\\0'",
        "assert f() == (b'\\xff', '\\ud800\\0')",
    ),
    "much printed": ("print('x' * 20_000_000)\ndef f(): return 1", "assert f() == 1"),
    "large values": (
        "def f(x): return [x, 10**3000, 'y' * 10**6]",
        "assert f(10**3000) == [10**3000, 10**3000, 'y' * 10**6]",
    ),
}


def run_honest(code, tests, in_jail):
    "An honest program; then the same with a test that must fail."
    return in_jail(code, tests), in_jail(code, tests + "\nassert False")


@pytest.mark.parametrize("name", HONEST)
def test_honest_program_passes(name, where, batch):
    result, control = batch(HONEST, where, run_honest)[name]
    assert result.passed is True and result.status == "ok", result
    assert control.status == "failed", "these tests hold whatever the program does"


# Each attempt returns if it worked and raises if it was denied.
ATTEMPTS = """
import ctypes, os, resource, socket, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
def check(outcome):
    if outcome == -1: raise OSError(ctypes.get_errno(), 'denied')
def connect(family, address, kind=socket.SOCK_STREAM):
    with socket.socket(family, kind) as one: one.connect(address)
def write(path):
    with open(path, 'a'): pass
def remove_after(path, action):
    action(path)
    os.remove(path)
def through_link(host, mode):
    if not os.path.islink('link'): os.symlink(host['file'], 'link')
    with open('link', mode): pass
def memory():
    number = libc.shmget(0x4a4149, 4096, 0o1600)
    check(number)
    check(libc.shmctl(number, 0, None))
def environment(host):
    if b'HOST_TOKEN' not in open(f"/proc/{host['victim']}/environ", 'rb').read(): raise OSError('empty')
def datagram(host):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one: one.sendto(b'x', ('127.0.0.1', host['port']))
def pair(host):
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
ATTEMPTS = {
    'read a file': lambda host: open(host['file']).close(),
    'list a folder': lambda host: os.listdir(host['folder']),
    'list the root of the host': lambda host: os.stat('/etc/passwd') and open('/etc/passwd').close(),
    'read an environment': environment,
    'read a process': lambda host: open(f"/proc/{host['host']}/status").close(),
    'append to a file': lambda host: write(host['file']),
    'write a file outside': lambda host: remove_after(host['folder'] + '/left', write),
    'make a folder outside': lambda host: os.rmdir(host['folder'] + '/left') if os.mkdir(host['folder'] + '/left') is None else None,
    'climb out': lambda host: open('../' * 30 + host['file']).close(),
    'read through a link': lambda host: through_link(host, 'r'),
    'write through a link': lambda host: through_link(host, 'a'),
    'a hard link': lambda host: remove_after(host['folder'] + '/left', lambda path: os.link(host['file'], path)),
    'change a mode': lambda host: os.chmod(host['file'], 0o666),
    'change times': lambda host: os.utime(host['file']),
    'cut a file off': lambda host: os.truncate(host['file'], os.stat(host['file']).st_size),
    'a signal to the host': lambda host: os.kill(host['host'], 0),
    'a signal to a bystander': lambda host: os.kill(host['victim'], 0),
    'a signal to the parent': lambda host: os.kill(os.getppid(), 0),
    'trace a process': lambda host: check(libc.ptrace(0x4206, host['victim'], 0, 0)) or check(libc.ptrace(0x4207, host['victim'], 0, 0)),
    'limit a process': lambda host: resource.prlimit(host['victim'], resource.RLIMIT_CORE),
    'slow a process down': lambda host: os.setpriority(os.PRIO_PROCESS, host['victim'], 0),
    'own a signal by a file': lambda host: __import__('fcntl').fcntl(1, 8, host['victim']),
    'connect by TCP': lambda host: connect(socket.AF_INET, ('127.0.0.1', host['port'])),
    'send by UDP': datagram,
    'listen': lambda host: socket.create_server(('127.0.0.1', 0)).close(),
    'connect by name': lambda host: socket.create_connection(('localhost', host['port'])).close(),
    'connect to a local socket': lambda host: connect(socket.AF_UNIX, host['unix']),
    'a pair of datagram sockets': pair,
    'start a shell': lambda host: subprocess.run(['/bin/sh', '-c', 'true'], check=True),
    'start Python': lambda host: subprocess.run([sys.executable, '-c', 'pass'], check=True),
    'fork': lambda host: os._exit(0) if os.fork() == 0 else os.wait(),
    'become a daemon': lambda host: (os.setsid() if os.fork() == 0 else 0) and os._exit(0),
    'shared memory': lambda host: memory(),
    'leave a file in shared memory': lambda host: remove_after('/dev/shm/left-file', write),
    'a namespace of its own': lambda host: check(libc.unshare(0x10000000)),
    'io_uring': lambda host: check(libc.syscall(425, 8, ctypes.create_string_buffer(256))),
    'watch files': lambda host: check(libc.inotify_init()),
}
def worked(host, leave_out=()):
    done = []
    for name, attempt in ATTEMPTS.items():
        if name in leave_out: continue
        try: attempt(host)
        except (OSError, subprocess.SubprocessError) as error: continue
        done.append(name)
    return done
def names(): return list(ATTEMPTS)
"""
# What may be impossible even without walls, depending on the kernel's settings: no control for these.
UNSURE = [
    "trace a process",
    "a namespace of its own",
    "io_uring",
    "connect by name",
    "list the root of the host",
]


def test_attempts_on_the_host(where, host):
    host = host[0]
    result = run_code(
        ATTEMPTS, f"assert len(names()) > 30\nassert worked({host!r}) == []", using=where, timeout_s=60
    )
    assert result.passed is True, result
    again = run_code(
        ATTEMPTS, f"print(worked({host!r}))\nassert worked({host!r}) != []", using=where, timeout_s=60
    )
    assert again.status == "failed" and again.stdout == "[]\n"


# Calls that a program must not make, by the numbers of x86-64; each plainly and with upper bits that the
# kernel ignores.
FORBIDDEN_CALLS = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *parts): return libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(part) for part in parts))
NAME = ctypes.create_string_buffer(b".")
CALLS = {
    "a file's owner": lambda high: call(72, 1, 8 | high, 0), # fcntl F_SETOWN
    "a file's signal": lambda high: call(72, 1, 10 | high, 10), # F_SETSIG
    "a folder's changes": lambda high: call(72, os.open(".", 0), 1026 | high, 1), # F_NOTIFY
    "the size of a pipe": lambda high: call(72, 1, 1031 | high, 1 << 17), # F_SETPIPE_SZ
    "outlive the supervisor": lambda high: call(157, 1 | high, 0), # prctl PR_SET_PDEATHSIG
    "memory dumps": lambda high: call(157, 4 | high, 1), # PR_SET_DUMPABLE
    "adopt others' children": lambda high: call(157, 36 | high, 1), # PR_SET_CHILD_SUBREAPER
    "the timers' slack": lambda high: call(157, 29 | high, 1), # PR_SET_TIMERSLACK
    "another personality": lambda high: call(135, 0x40000),
    "a local datagram pair": lambda high: call(53, 1 | high, 2 | high, 0, ctypes.addressof((ctypes.c_int * 2)())),
    "a process": lambda high: call(56, 17 | high, 0, 0, 0, 0) or os._exit(0), # clone
    "reserve disk": lambda high: call(285, os.open("reserved", os.O_CREAT | os.O_RDWR), 1, 0, 1 << 24), # fallocate, past the file's end
    "a file without a name": lambda high: call(257, -100 % 2**64, ctypes.addressof(NAME), 0x410002 | high, 0o600), # O_TMPFILE
    "a file in memory": lambda high: call(319, ctypes.addressof(NAME), 0),
    "a message with descriptors": lambda high: call(46, 1, 0, 0) if not high else -1, # sendmsg
    "a system call of next year": lambda high: call(700),
}
def worked(): return [(name, high) for name, attempt in CALLS.items() for high in (0, 1 << 32, 1 << 63) if attempt(high) != -1]
def denied(): return [ctypes.get_errno() for attempt in CALLS.values() if attempt(0) == -1]
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86-64")
def test_a_call_is_denied_whatever_its_upper_bits(where):
    "The kernel reads 32 bits of most arguments; a filter that compares 64 lets the others through."
    result = run_code(
        FORBIDDEN_CALLS, "assert worked() == [], worked()\nassert set(denied()) == {1}", using=where
    )
    assert result.passed, result


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86-64")
def test_without_walls_these_calls_work():
    "The control: the kernel takes most of them with the upper bits set."
    with pytest.warns(RuntimeWarning, match="WITHOUT any isolation"):
        result = run_code(
            FORBIDDEN_CALLS,
            "print(len([name for name, high in worked() if high]))\nassert len(worked()) > 25",
            using="none",
            allow_unsafe=True,
        )
    assert result.passed and int(result.stdout) > 15, result


# Programs that hold as much disk as they can where no count of their folder finds it; `held()` is what they
# got.
HOARDERS = {
    "unlinked, mapped": (
        "with open('f', 'w+b') as file:\n    fill(file)\n    keep.append(mmap.mmap(file.fileno(),"
        " 4096))\nos.unlink('f')"
    ),
    "unlinked, open": "file = open('f', 'w+b')\nkeep.append(file)\nos.unlink('f')\nfill(file)",
    "in a folder that cannot be listed": "os.makedirs('d', 0o300, True)\nfill(open(f'd/{len(made)}', 'wb'))",
    "in folders that cannot be entered": (
        "os.mkdir(f'd{len(made)}')\nfill(open(f'd{len(made)}/f', 'wb'))\nos.rename(f'd{len(made)}',"
        " f'e{len(made)}')"
    ),
    "under one name": (
        "os.path.exists('f') and os.unlink('f')\nfile = open('f',"
        " 'w+b')\nfill(file)\nkeep.append(mmap.mmap(file.fileno(), 4096))"
    ),
}
HOARD = """
import mmap, os
keep, made, failed = [], [], 0
def fill(file):
    made.append(0)
    try:
        while True: made[-1] += os.write(file.fileno(), b"x" * 65536)
    except OSError as error:
        if error.errno != 27: raise # the file is full
def hoard():
{body}
while failed < 50 and len(made) < 4096:
    try: hoard()
    except OSError: failed += 1
def held(): return sum(made), len(made)
"""


@pytest.mark.parametrize("name", HOARDERS)
def test_disk_has_a_bound_that_nothing_hides_from(name, where):
    body = "".join(f"    {line}\n" for line in HOARDERS[name].splitlines())
    bound = (
        (walls.FOLDER_LIMIT, 16384)
        if where == "bubblewrap"
        else (walls.QUOTA // walls.FILE_COST * walls.FILE_LIMIT, 512)
    )
    result = run_code(
        HOARD.format(body=body),
        f"print(held())\nassert 2**20 < held()[0] <= {bound[0]} and held()[1] <= {bound[1]}",
        using=where,
        timeout_s=60,
    )
    assert result.passed, result


INODES = """
import os
def count(make):
    try:
        for number in range(100_000): make(number)
    except OSError: return number
def made():
    return [count(lambda n: os.mkdir(f"folder{n}")), count(lambda n: os.symlink("x" * 200, f"link{n}")), count(lambda n: os.close(os.open(f"file{n}", os.O_CREAT)))]
"""


def test_inodes_have_a_bound(where, monkeypatch):
    """Folders, links and files together; with Landlock by a quota of 200, since making and removing 4,096
    takes seconds.
    """
    monkeypatch.setattr(sandbox, "creation_quota", lambda: {**walls.creation_quota(), "left": 200})
    most = 16384 if where == "bubblewrap" else 200
    result = run_code(INODES, f"assert {most} - 9 < sum(made()) <= {most}", using=where, timeout_s=60)
    assert result.passed, result


def test_files_of_an_ordinary_size_are_no_matter(where):
    "A log that is opened 400 times, a database, a temporary file, a file of 200 KB: what honest programs do."
    code = """
import os, sqlite3, tempfile
def work():
    for number in range(400):
        with open("log", "a") as file: file.write(f"{number}\\n")
    with sqlite3.connect("base.db") as base: base.execute("create table t (x)").execute("insert into t values (5)")
    with tempfile.TemporaryFile() as file:
        file.write(b"x" * 200_000)
        size = file.tell()
    with tempfile.TemporaryDirectory() as folder: open(os.path.join(folder, "a"), "w").close()
    return len(open("log").readlines()), base.execute("select x from t").fetchone(), size"""
    result = run_code(code, "assert work() == (400, (5,), 200_000)", using=where)
    assert result.passed, result


LEAVES = """import builtins, ctypes, gc, os, signal, sys, threading
open('left', 'w').write('x')
os.mkdir('folder')
builtins.left = sys.left = 'here'
builtins.compile = builtins.exec = None
sys.modules['math'] = None
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.umask(0)
threading.Thread(target=signal.pause, daemon=True).start()
for number in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9): ctypes.CDLL(None).shutdown(number, 2)
libc = ctypes.CDLL(None)
for action in ((272, 0x20000), (308, 3, 0x20000000), (165, 0, b'/jail', b'tmpfs', 0, 0), (166, b'/jail', 2), (157, 38, 0)): libc.syscall(*action)
"""
FINDS = """import builtins, os, signal, sys
import math
def found():
    return [os.listdir('.'), hasattr(builtins, 'left') or hasattr(sys, 'left'), math is None, str(signal.getsignal(signal.SIGTERM)), os.umask(0o77) == 0]
"""


def test_programs_of_one_jail_do_not_meet(where):
    """What a program leaves in files, modules, signals, descriptors or the warm interpreter, no later one
    finds, and the jail goes on.
    """
    with sandbox.Jail(where) as jail:
        before = sandbox._run_in(jail, (FINDS + "print(found())", "assert found()"), 10, 512)
        for _ in range(3):
            assert sandbox._run_in(jail, (LEAVES, ""), 10, 512).status in ("ok", "failed")
        after = sandbox._run_in(jail, (FINDS + "print(found())", "assert found()"), 10, 512)
        assert (
            before.passed
            and after.passed
            and before.stdout == after.stdout
            and "[[], False, False," in after.stdout
        ), (before, after)
        assert sandbox._run_in(jail, (ADD, ADD_TESTS), 10, 512).passed


def test_no_program_reaches_the_socket_of_its_jail(where):
    """A program has its output, its two pipes and nothing of the interpreter that it was forked from; rights
    to change the view are gone.
    """
    code = """import ctypes, os, stat
def kinds():
    found = {}
    for number in range(64):
        try: found[number] = stat.S_IFMT(os.fstat(number).st_mode)
        except OSError: pass
    return [number for number, kind in found.items() if kind == stat.S_IFSOCK], len(found)
def rights():
    libc, data = ctypes.CDLL(None), (ctypes.c_uint32 * 6)()
    libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), data)
    return list(data)"""
    # reading past file modes, where the interpreter lies in root's home
    allowed = [[0] * 6, [4, 4, 0, 0, 0, 0]] if where == "landlock" else [[0] * 6]
    result = run_code(
        code, f"assert kinds() == ([], 5), kinds()\nassert rights() in {allowed}, rights()", using=where
    )
    assert result.passed, result


def test_a_jail_that_is_gone_gives_no_score(where):
    with sandbox.Jail(where) as jail:
        jail.process.kill()
        jail.process.wait()
        result = sandbox._run_in(jail, (ADD, ADD_TESTS), 5, 512)
    assert result.passed is None and result.status == "sandbox-error"


def test_without_walls_the_attempts_work(host):
    "The control: what the test above sees denied is possible where nothing denies it."
    host = host[0]
    with pytest.warns(RuntimeWarning, match="WITHOUT any isolation"):
        result = run_code(
            ATTEMPTS,
            f"missed = set(names()) - set(worked({host!r}, {UNSURE!r})) -"
            f" set({UNSURE!r})\nprint(sorted(missed))\nassert not missed",
            using="none",
            allow_unsafe=True,
            timeout_s=20,
            memory_mb=2048,
        )
    assert result.passed is True, result


def test_environment_and_arguments_are_empty(where, monkeypatch):
    monkeypatch.setenv("HOST_TOKEN", "s3cret")
    result = run_code(
        "import os, sys\ndef seen(): return list(os.environ), [word for word in sys.argv if 'HOST' in word],"
        " os.getcwd(), sys.path",
        "assert 'HOST_TOKEN' not in seen()[0] and len(seen()[0]) <= 2 and not seen()[1]\nassert not"
        " any('site-packages' in path for path in seen()[3])",
        using=where,
    )
    assert result.passed, result


def test_folder_is_private_empty_and_removed(where):
    code = (
        "import os\ndef f():\n    before = os.listdir('.')\n    open('mine', 'w').close()\n    return before,"
        " os.getcwd()"
    )
    results = run_many([(code + "\nprint(f()[1])", "assert f()[0] == ['mine']")] * 4, using=where)
    assert all(result.passed for result in results), results
    folders = {result.stdout.strip() for result in results}
    assert len(folders) == (1 if where == "bubblewrap" else 4), folders
    assert not any(Path(folder).exists() for folder in folders)
    assert run_code(code, "assert f()[0] == []", using=where).passed


def test_root_does_not_stay_root(where):
    result = run_code(
        "import os\ndef users(): return [*os.getresuid(), *os.getresgid(), *os.getgroups()]",
        "assert 0 not in users()",
        using=where,
    )
    assert result.passed, result


def test_other_users_programs_do_not_meet(where):
    "One program cannot see or signal another that runs at the same time."
    spy = (
        "import os\ndef reached():\n    found = []\n    for number in range(2, 70000):\n        if number =="
        " os.getpid(): continue\n        try: os.kill(number, 0)\n        except OSError: continue\n       "
        " found.append(number)\n    return found"
    )
    results = run_many(
        [("import time\ntime.sleep(1)", "")] * 3 + [(spy, "assert reached() == []")], using=where, workers=4
    )
    assert all(result.passed for result in results), results


@pytest.mark.parametrize("limit", ["memory_mb", "timeout_s"])
def test_limits_follow_the_arguments(where, limit):
    code, small, large = {
        "memory_mb": ("x = bytearray(300 * 2**20)", 200, 600),
        "timeout_s": ("import time\ntime.sleep(0.8)", 0.4, 60),
    }[limit]
    assert run_code(code, using=where, **{limit: small}).status == limit.split("_")[0].replace(
        "timeout", "timeout"
    )
    assert run_code(code, using=where, **{limit: large}).passed


def test_processor_time_is_limited_too(where):
    "Sixteen threads do not escape: the wall clock or, with many processors, the processor's clock ends them."
    alone = run_code("while True: pass", timeout_s=1.5, using=where)  # how late this machine is today
    result = run_code(
        "import threading, hashlib\nblock = bytes(10**7)\ndef spin():\n    while True:"
        " hashlib.sha256(block)\nfor _ in range(16): threading.Thread(target=spin).start()\nspin()",
        timeout_s=1.5,
        using=where,
    )
    assert alone.status == result.status == "timeout" and result.seconds < 5 * alone.seconds


@pytest.mark.parametrize("rounds", [20, pytest.param(100, marks=pytest.mark.long)])
def test_hundreds_of_programs_leave_nothing(where, rounds):
    kinds = [
        (ADD, ADD_TESTS, "ok"),
        ("import os\nos._exit(0)", ADD_TESTS, "failed"),
        ("open('file', 'w').write('x' * 1000)", "", "ok"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(600,)).start()", "", "ok"),
        ("import ctypes\nctypes.string_at(0)", "", "killed"),
    ]
    before = traces()
    rounds = 10 if "ORDINARY" in os.environ else rounds  # fewer when the file runs a second time
    results = run_many([kind[:2] for kind in kinds * rounds], using=where, timeout_s=60)
    assert [result.status for result in results] == [kind[2] for kind in kinds * rounds]
    assert traces() == before  # nor was any thread waited for: each sleeps longer than a program may run


def test_a_host_that_dies_takes_the_jail_along(where, tmp_path):
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o1777)  # as /tmp is: the jail's user may remove its own folder there
    program = "import time\nprint('here', flush=True)\ntime.sleep(900.125)"
    host = subprocess.Popen(
        [
            sys.executable,
            "-c",
            (
                f"from compassion_repro.sandbox import jail as sandbox\nsandbox.BOOT += {MARK!r}\nprint('up',"
                f" flush=True)\nsandbox.run_code({program!r}, timeout_s=900, using={where!r})"
            ),
        ],
        stdout=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    host.stdout.readline()
    deadline = time.monotonic() + 300

    # not the host, nor what it forks on its way
    def jailed():
        return [number for number in traces()["processes"] if b"900.125" not in command_line(number)]

    # the warm interpreter, the supervisor, the program, its judge
    while len(jailed()) < 4 + (where == "bubblewrap") and time.monotonic() < deadline:
        time.sleep(0.05)
    family = psutil.Process(host.pid).children(recursive=True)
    assert len(jailed()) == len(family) == 4 + (where == "bubblewrap")
    host.kill()
    host.wait()
    host.stdout.close()
    gone, alive = psutil.wait_procs(family, timeout=120)
    assert not alive
    while traces()["processes"] and time.monotonic() < deadline:
        time.sleep(0.05)
    folder.rmdir()  # fails if the jail left its own folder there


def test_benchmark(where):
    figures = benchmark(20, where)
    assert (
        figures["level"] == where
        and figures["programs_per_second"] > 0
        and figures["ratio_to_bare"] > 1
        and figures["overhead_milliseconds"] > 0
    )


def test_nothing_runs_where_no_level_holds(monkeypatch, tmp_path):
    monkeypatch.setattr(sandbox, "level", lambda: "none")
    result = run_code(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert (
        result.passed is None
        and result.status == "sandbox-error"
        and "bubblewrap" in result.stderr
        and not (tmp_path / "ran").exists()
    )
    with pytest.warns(RuntimeWarning, match="WITHOUT any isolation"):
        assert run_code(f"open({str(tmp_path / 'ran')!r}, 'w')", allow_unsafe=True).passed
    assert (tmp_path / "ran").exists()
    with pytest.warns(RuntimeWarning):
        assert run_code(ADD, ADD_TESTS, allow_unsafe=True).passed
    with pytest.warns(RuntimeWarning):
        assert run_code("def add(x, y): return 0", ADD_TESTS, allow_unsafe=True).passed is False
    with pytest.warns(RuntimeWarning):
        assert run_code("while True: pass", allow_unsafe=True, timeout_s=0.3).status == "timeout"


@pytest.mark.parametrize("broken", ["filter", "restrict", "interpreter"])
def test_a_broken_jail_gives_no_score(broken, where, monkeypatch):
    if broken == "filter":
        monkeypatch.setattr(sandbox, "system_call_filter", lambda: b"\xff" * 8)
    if broken == "restrict":
        monkeypatch.setattr(sandbox, "limits", lambda *rest: {"RLIMIT_NO_SUCH": 1})
    if broken == "interpreter":
        monkeypatch.setattr(sandbox, "interpreter_files", lambda: ("/nowhere/python", ("/lib",)))
    result = run_code(ADD, ADD_TESTS, using=where)
    assert result.passed is None and result.status == "sandbox-error" and "sandbox:" in result.stderr


def test_a_missing_package_is_a_reason_not_a_crash(monkeypatch):
    sandbox.probe.cache_clear()
    walls.system_call_filter.cache_clear()
    try:
        for name in ("pyseccomp", "landlockpy"):
            monkeypatch.setitem(sys.modules, name, None)
        for name in LEVELS[:-1]:
            assert "pyseccomp" in probe(name)
    finally:
        sandbox.probe.cache_clear()


def test_tests_that_do_not_compile_give_no_score(where):
    result = run_code(ADD, "assert add(", using=where)
    assert result.passed is None and result.status == "sandbox-error" and "do not compile" in result.stderr


NESTED = """import ctypes, pyseccomp
from compassion_repro.sandbox import jail as sandbox, walls
wall = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
wall.add_rule(pyseccomp.NOTIFY, "swapon")
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)
assert libc.syscall(walls.creation_quota()["call"], 1, 8, walls._seccomp_program(walls._compiled(wall))) >= 0
print(sandbox.describe_level())
"""


def test_inside_a_sandbox_that_answers_system_calls_the_level_says_what_to_do(tmp_path):
    if reason := probe("landlock"):
        pytest.skip(f"landlock does not work here: {reason}")
    done = subprocess.run(
        [sys.executable, "-c", NESTED],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": str(tmp_path)},
    )
    assert re.match(
        r"none \(bubblewrap: .*; landlock: another sandbox .* install bubblewrap, or run outside", done.stdout
    ), done
    assert "OSError" not in done.stdout and done.stdout.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"using": "cellar"}, "unknown sandbox level"),
        ({"timeout_s": 0}, "above 0"),
        ({"timeout_s": -1}, "above 0"),
        ({"timeout_s": float("nan")}, "above 0"),
        ({"timeout_s": float("inf")}, "above 0"),
        ({"memory_mb": float("inf")}, "at least 32"),
        ({"memory_mb": 1}, "at least 32"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, words):
    with pytest.raises(InputError, match=words) as caught:
        run_code(ADD, ADD_TESTS, **arguments)
    assert "\n" not in str(caught.value)


def test_room_is_light():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            (
                "import sys\nfrom compassion_repro.sandbox import jail as sandbox\nprint([name for name in"
                " ('torch', 'transformers', 'trl', 'datasets', 'inspect_ai', 'pyseccomp') if name in"
                " sys.modules])"
            ),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


# what no user changes
SAME = (
    "weak_comparisons or benchmark or bad_arguments or room_is_light or processor_time or do_not_compile"
    " or missing_package"
)


@pytest.mark.skipif(os.geteuid() != 0, reason="runs as an ordinary user already")
@pytest.mark.long
def test_all_of_this_as_an_ordinary_user():
    """The file again as user 65534, in a view of the file system where that user can reach the
    interpreter.
    """
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip(
            "this machine does not let root mount, so an ordinary user cannot be given the interpreter"
        )
    folder = Path(tempfile.mkdtemp(prefix="ordinary-"))
    folder.chmod(0o755)
    places = {"python": sys.base_prefix, "site": sysconfig.get_path("purelib"), "repository": str(ROOT)}
    for name in (*places, "home"):
        (folder / name).mkdir()
    os.chown(folder / "home", 65534, 65534)
    python = folder / "python" / "bin" / Path(os.path.realpath(sys.executable)).name
    environment = [
        f"PYTHONPATH={folder}/repository:{folder}/site",
        f"LD_LIBRARY_PATH={folder}/python/lib",
        f"HOME={folder}/home",
        f"TMPDIR={folder}/home",
        f"PATH={os.environ['PATH']}",
        "PYTHONDONTWRITEBYTECODE=1",
        "ORDINARY=1",
    ]
    mounts = " && ".join(f"mount --bind '{source}' '{folder}/{name}'" for name, source in places.items())
    command = (
        f"{mounts} && cd '{folder}/repository' && exec setpriv --reuid=65534 --regid=65534 --clear-groups env"
        f" -i {' '.join(environment)} '{python}' -m pytest -q -rs -p no:cacheprovider -k 'not ({SAME})'"
        " tests/sandbox/test_sandbox.py"
    )
    try:
        done = subprocess.run(["unshare", "--mount", "sh", "-c", command], capture_output=True, text=True)
    finally:
        shutil.rmtree(folder)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    levels = sum(not probe(name) for name in LEVELS[:-1])
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) >= levels * (
        len(HOSTILE) + len(CHEATS) + len(HONEST)
    ), done.stdout
