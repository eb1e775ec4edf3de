"""What `import ldyn` costs, side by side with `import torch`, and what it must not load."""

import json
import statistics
import subprocess
import sys

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
    """Print medians and their ratios; fail when a limit is passed."""
    statements = {
        "import torch": "import torch",
        "import ldyn": "import ldyn",
        "import ldyn, its functions": "from ldyn.foundations import jacobians, kl, softmax",
    }
    medians = {}
    for label, statement in statements.items():
        seconds(statement)
        medians[label] = statistics.median(seconds(statement) for _ in range(ROUNDS))
    failures = []
    for label, statement in statements.items():
        ratio, extra = medians[label] / medians["import torch"], loaded(statement)
        print(f"{label:28} {medians[label]:7.3f} s   {ratio:5.2f} × import torch   also loads: {extra or 'nothing'}")
        if ratio > LIMIT or ("ldyn" in label and extra):
            failures.append(label)
    if failures:
        sys.exit(f"over the limit of {LIMIT} × import torch, or loading what it must not: {failures}")


if __name__ == "__main__":
    main()
