"""`make audit`: the pinned dependencies looked up among the known vulnerabilities, with pip-audit (PyPI's
advisories, else OSV's).

Exit status 0: every pin was looked up and none is known to be vulnerable. 1: some are, each named with the
version that mends it. 2: the databases could not be asked.
"""

import json
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).resolve().parents[1] / "constraints.txt"


def look_up(service: str, pins: Path = PINS) -> list[dict] | None:
    "What one database knows of every pin; None where it cannot be asked."
    words = [
        sys.executable,
        "-m",
        "pip_audit",
        "--requirement",
        str(pins),
        "--no-deps",
        "--disable-pip",
        "--vulnerability-service",
        service,
        "--format",
        "json",
        "--progress-spinner",
        "off",
        "--timeout",
        "15",
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    try:
        return json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return None


def judge(found: list[dict] | None) -> tuple[int, list[str]]:
    "Exit status and lines for what a database said."
    known = [d for d in found or [] if "vulns" in d]
    if not known:
        return 2, []
    lines = [
        f"{d['name']} {d['version']}: {v['id']}"
        + (f", mended in {', '.join(v['fix_versions'])}" if v["fix_versions"] else ", no mended version yet")
        for d in known
        for v in d["vulns"]
    ]
    unknown = [d["name"] for d in found if "vulns" not in d]
    told = f"{len(known)} of {len(found)} pins looked up" + (
        f" (not in the database: {', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''})"
        if unknown
        else ""
    )
    return int(bool(lines)), [*lines, f"{told}; {len(lines)} known vulnerabilities"]


def main() -> int:
    for service in ("pypi", "osv"):
        status, lines = judge(look_up(service))
        if status != 2:
            print("\n".join([*lines[:-1], f"{service}: {lines[-1]}"]))
            return status
    print(
        "audit: neither pypi.org nor api.osv.dev could be asked about known vulnerabilities: check the"
        " network and run `make audit` again",
        file=sys.stderr,
    )
    return 2


if __name__ == "__main__":
    sys.exit(main())
