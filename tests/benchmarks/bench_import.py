"""What `import ldyn` costs, side by side with `import torch`, and what it must not load."""

import json
import statistics
import subprocess
import sys

import table

ROUNDS = 7
LIMIT = 1.3
FORBIDDEN = ("matplotlib", "scipy", "sklearn", "sphinx", "sympy", "transformers")


def seconds(statement: str) -> float:
    """Time a statement in a fresh interpreter, from inside, so that start-up does not dilute the ratio."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def loaded(statement: str) -> list[str]:
    """Name the forbidden packages that a statement loads."""
    code = f"import json, sys; {statement}; print(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    return [name for name in FORBIDDEN if name in json.loads(output)]


def main() -> None:
    """Write medians and their ratios into the table; stop when a limit is passed."""
    statements = {
        "import torch": "import torch",
        "import ldyn": "import ldyn",
        "import ldyn and its functions": (
            "from ldyn.dynamics import akg; from ldyn.foundations import jacobians, kl, softmax; "
            "from ldyn.kernels import entk"
        ),
    }
    medians = {}
    for label, statement in statements.items():
        seconds(statement)
        medians[label] = statistics.median(seconds(statement) for _ in range(ROUNDS))
    base = medians.pop("import torch")
    rows = [table.at_most(label, median, "import torch", base, LIMIT) for label, median in medians.items()]
    for label in medians:
        extra = loaded(statements[label])
        found = ", ".join(extra) or "nothing"
        rows.append(table.Row(f"what else {label} loads", found, "what it must not", "–", "–", "nothing", not extra))
    table.publish("import", rows)


if __name__ == "__main__":
    main()
