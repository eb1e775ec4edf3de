"""The memory that a piece of work needs at its peak, measured in a process of its own (Linux)."""

import subprocess
import sys
from textwrap import dedent

_STATUS = """
import sys
from pathlib import Path

def status(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) / 1024
"""
# The peak that the kernel keeps is inherited from the parent and includes the imports: it is forgotten before the work.
_BEFORE = """
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
"""
_AFTER = """
print(status("VmHWM") - before)
"""


def growth(setup: str, work: str, *arguments: object) -> float:
    """Return by how many MB some work raises the resident memory of a new process at its peak.

    Args:
        setup: Statements that are not measured; the arguments are in ``sys.argv[1:]`` as text.
        work: The statements that are.
        arguments: What to hand over.
    """
    script = _STATUS + dedent(setup) + _BEFORE + dedent(work) + _AFTER
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
