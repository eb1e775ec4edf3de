"""What an import may load: the engine works without a site builder, a plotting library or a front end."""

import subprocess
import sys

import pytest


def loaded(statement):
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import ldyn", {"sympy", "scipy", "sphinx", "docutils", "matplotlib", "sklearn", "transformers"}),
        (
            "import ldyn.verify",
            {"sphinx", "docutils", "matplotlib", "IPython", "sklearn", "transformers", "torchvision", "scipy"},
        ),
        ("import ldyn.verify.ledger, ldyn.verify.graph", {"sphinx", "docutils", "matplotlib"}),
    ],
)
def test_an_import_loads_only_what_it_needs(statement, absent):
    assert not loaded(statement) & absent


def test_a_claim_needs_no_front_end():
    names = loaded(
        "from ldyn.verify import Claim\n"
        "with Claim('plain', unproved='a test') as c:\n"
        "    c.agrees(lambda v: v + v, lambda v: 2 * v, [(1.0,)]); c.rejects('half', lambda v: v)\n"
        "print(c)"
    )
    assert not names & {"IPython", "sphinx", "matplotlib"}
