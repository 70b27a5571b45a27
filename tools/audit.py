"""`make audit`: the pinned dependencies looked up among the known vulnerabilities, with pip-audit (PyPI's
advisories, else OSV's).

Exit status 0: every pin was looked up and none is known to be vulnerable. 1: some are, each named with the
version that fixes it. 2: the databases could not be asked.
"""

import json
import subprocess
import sys
from pathlib import Path

PIP_AUDIT = (sys.executable, "-m", "pip_audit")
PINS = Path(__file__).resolve().parents[1] / "constraints.txt"


def look_up(service: str, pins: Path = PINS) -> list[dict] | None:
    "What one database knows of every pin; None where it cannot be asked."
    options = "--no-deps --disable-pip --format json --progress-spinner off --timeout 15".split()
    which = ["--requirement", str(pins), "--vulnerability-service", service]
    done = subprocess.run([*PIP_AUDIT, *which, *options], capture_output=True, text=True)
    try:
        return json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return None


def judge(found: list[dict] | None) -> tuple[int, list[str]]:
    "Exit status and lines for what a database said."
    known = [d for d in found or [] if "vulns" in d]
    if not known:
        return 2, []
    lines = []
    for pin in known:
        for flaw in pin["vulns"]:
            fixed = ", ".join(flaw["fix_versions"])
            version = f"fixed in {fixed}" if fixed else "no fixed version yet"
            lines.append(f"{pin['name']} {pin['version']}: {flaw['id']}, {version}")
    unknown = [d["name"] for d in found if "vulns" not in d]
    names = ", ".join([*unknown[:5], *["..."] * (len(unknown) > 5)])
    missing = f" (not in the database: {names})" if unknown else ""
    count = f"{len(known)} of {len(found)} pins looked up{missing}"
    return int(bool(lines)), [*lines, f"{count}; {len(lines)} known vulnerabilities"]


def main() -> int:
    "Ask one database, else the other; print what they know."
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
