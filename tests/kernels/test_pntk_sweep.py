"""The sweep over digits: its networks, its records against other routes, and its file against the theorems."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from ldyn import data, models
from ldyn.kernels import pntk_sweep as sweep
from ldyn.kernels.entk import KINDS, entk
from ldyn.kernels.pntk_sweep import FEW, SOME, Record, Run


def test_the_convolutional_network_is_what_it_says():
    x = data.digits().images[:7]
    model = sweep.conv_net(3, seed=5)
    first, second, head = model.parameters()
    assert (tuple(first.shape), tuple(second.shape), tuple(head.shape)) == ((3, 1, 3, 3), (3, 3, 3, 3), (10, 192))
    image = x.reshape(7, 1, 8, 8)
    hidden = functional.conv2d(functional.conv2d(image, first, padding=1).relu(), second, padding=1).relu()
    torch.testing.assert_close(model(x), hidden.reshape(7, -1) @ head.T)
    wide = sweep.conv_net(64, seed=0)
    for weight in list(wide.parameters())[1:]:
        assert float(weight.detach().std()) == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.03)


def test_networks_come_from_private_generators():
    state = torch.random.get_rng_state()
    for net in sweep.WIDTHS:
        one, again, other = (models.flat_parameters(sweep.network(net, 4, seed)) for seed in (1, 1, 2))
        assert torch.equal(one, again)
        assert not torch.equal(one, other)
        assert one.dtype == torch.float64
    assert torch.equal(state, torch.random.get_rng_state())
    assert sweep.conv_net(2, dtype=torch.float32)(torch.zeros(3, 64)).shape == (3, 10)


def test_training_moves_a_copy():
    train = data.split(data.digits()).train
    model = sweep.network("mlp", 16, 0)
    before = models.flat_parameters(model)
    after = sweep.trained(model, train, steps=100)
    assert torch.equal(models.flat_parameters(model), before)
    accuracy = [float((m(train.images).argmax(1) == train.labels).double().mean()) for m in (model, after)]
    assert accuracy[0] < 0.4 < 0.8 < accuracy[1]


@pytest.fixture(scope="module")
def measured():
    return {
        record.kind: record for record in sweep.measure(sweep.network("mlp", 8, 3), Run("mlp", 8, 3, "initial", 12))
    }


def test_a_measurement_equals_the_definitions(measured):
    """By NumPy, from the stacked matrices of all examples at once, examples first."""
    model = sweep.network("mlp", 8, 3)
    train, held = data.split(data.digits())
    x, labels = torch.cat([train.images[:12], held.images[:12]]), held.labels[:12]
    blocks = entk(model, x)
    K = blocks.permute(0, 2, 1, 3).reshape(240, 240).numpy()
    numbers = {
        "first": blocks[..., 0, 0],
        "sum": blocks.sum((-2, -1)) / 10,
        "trace": torch.einsum("ijaa->ij", blocks) / 10,
    }
    y = np.eye(10)[train.labels[:12].numpy()].reshape(-1)
    ridge = 0.01 * np.trace(K[:120, :120]) / 120

    def regression(matrix):
        weights = np.linalg.solve(matrix[:120, :120] + ridge * np.eye(120), y)
        return (matrix[120:, :120] @ weights).reshape(12, 10)

    wanted = regression(K)
    assert measured["entk"].accuracy_ridge == (wanted.argmax(1) == labels.numpy()).mean()
    with torch.no_grad():
        share = float((model(held.images[:12]).argmax(1) == labels).double().mean())
    for kind in KINDS:
        record, P = measured[kind], np.kron(numbers[kind].numpy(), np.eye(10))
        values = np.linalg.eigvalsh(numbers[kind][:12, :12].numpy())
        assert record.error == pytest.approx(np.linalg.norm(K - P) / np.linalg.norm(K), rel=1e-10)
        assert record.norm_gap == pytest.approx(1 - np.linalg.norm(P) / np.linalg.norm(K), abs=1e-12)
        assert (record.smallest, record.largest) == pytest.approx((values[0], values[-1]), rel=1e-8)
        got = regression(P)
        assert record.accuracy_ridge == (got.argmax(1) == labels.numpy()).mean()
        assert record.difference_ridge == pytest.approx(np.linalg.norm(got - wanted) / np.linalg.norm(wanted), rel=1e-8)
        assert (record.parameters, record.network) == (8 * 64 + 64 + 80, share)


def test_what_is_not_defined_is_nan():
    """656 parameters, fewer than the 1000 rows of the kernel of a hundred digits."""
    found = {one.kind: one for one in sweep.measure(sweep.network("mlp", 8, 3), Run("mlp", 8, 3, "initial", FEW))}
    whole = found["entk"]
    assert math.isnan(whole.error)
    assert math.isnan(whole.accuracy)
    assert whole.smallest == 0.0
    assert not math.isnan(whole.accuracy_ridge)
    assert not math.isnan(found["trace"].accuracy)
    assert math.isnan(found["trace"].difference)


@pytest.mark.parametrize("net", list(sweep.WIDTHS))
@pytest.mark.parametrize("state", ["initial", "trained"])
def test_the_file_holds_what_a_new_measurement_finds(net, state):
    width, seed = sweep.WIDTHS[net][0], 4
    model = sweep.network(net, width, seed)
    if state == "trained":
        model = sweep.trained(model, data.split(data.digits()).train, seed=seed)
    run = Run(net, width, seed, state, FEW)
    stored = [record for record in sweep.records() if record[:5] == tuple(run)]
    new = sweep.measure(model, run)
    assert len(stored) == len(new) == 4
    for one, other in zip(stored, new, strict=True):
        assert one[:7] == other[:7]
        assert one[7:] == pytest.approx(other[7:], rel=1e-6, abs=1e-9, nan_ok=True)


def test_the_file_holds_the_whole_plan_once():
    wanted = [
        (net, width, seed, state, examples, kind)
        for net, width, seed, sizes in sweep.plan()
        for state in ("initial", "trained")
        for examples in sizes
        for kind in ("entk", *KINDS)
    ]
    assert sorted(record[:6] for record in sweep.records()) == sorted(wanted)


def test_the_file_obeys_the_theorems():
    table = {record[:6]: record for record in sweep.records()}
    assert len(table) > 200
    for record in table.values():
        whole = table[*record[:5], "entk"]
        assert 0 <= record.network <= 1
        assert (whole.parameters < 10 * record.examples) == (whole.smallest == 0)
        if record.kind == "entk":
            continue
        assert whole.smallest <= record.smallest * (1 + 1e-6)
        assert record.largest <= whole.largest * (1 + 1e-6)
        nearest = table[*record[:5], "trace"]
        assert nearest.error <= record.error * (1 + 1e-12)
        assert abs(record.norm_gap) <= record.error
        assert nearest.norm_gap == pytest.approx(1 - math.sqrt(1 - nearest.error**2), abs=1e-12)


# --- the command and the file -------------------------------------------------------------------------------------


def test_the_command_resumes_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "plan", lambda: iter([("mlp", 4, 0, (FEW,)), ("conv", 2, 0, (FEW,))]))
    measured = []

    def quick(model, run):
        if len(measured) == 3:
            raise InterruptedError
        measured.append(run)
        return tuple(Record(*run, kind, 1, 0.5, math.nan, *[1 / 3] * 7) for kind in ("entk", *KINDS))

    monkeypatch.setattr(sweep, "measure", quick)
    monkeypatch.setattr(sweep, "trained", lambda model, train, *, seed: model)
    path = tmp_path / "some.csv"
    with pytest.raises(InterruptedError):
        sweep.main(["--output", str(path)])
    first = path.read_text()
    assert len(sweep.records(path)) == 12
    measured.clear()
    sweep.main(["--output", str(path)])
    assert path.read_text().startswith(first)
    assert [run.state for run in measured] == ["trained"]
    again = sweep.records(path)
    assert len(again) == 16
    assert again[0].largest == 1 / 3
    assert math.isnan(again[0].error)
    sweep.main(["--output", str(path), "--net", "mlp", "--examples", str(FEW)])
    assert sweep.records(path) is not None
    assert len(measured) == 1
    assert capsys.readouterr().out == ""


def test_the_command_measures_what_it_was_asked_for(tmp_path, monkeypatch):
    """Each network at its own seed, before and after training on the training part, and nothing twice."""
    jobs = [("mlp", 4, 3, (FEW, SOME)), ("conv", 2, 1, (FEW, SOME))]
    monkeypatch.setattr(sweep, "plan", lambda: iter(jobs))
    trainings, measured = [], []
    images = data.split(data.digits()).train.images

    def training(model, train, *, seed):
        trainings.append((models.flat_parameters(model).numel(), seed))
        assert torch.equal(train.images, images)
        return models.moved(model, torch.ones_like(models.flat_parameters(model)))

    def quick(model, run):
        start = models.flat_parameters(sweep.network(run.net, run.width, run.seed))
        shift = models.flat_parameters(model) - start
        torch.testing.assert_close(shift, torch.full_like(shift, float(run.state == "trained")))
        measured.append(run)
        return tuple(Record(*run, kind, 1, 0.5, math.nan, *[1 / 3] * 7) for kind in ("entk", *KINDS))

    monkeypatch.setattr(sweep, "measure", quick)
    monkeypatch.setattr(sweep, "trained", training)
    path = tmp_path / "some.csv"
    sizes = [models.flat_parameters(sweep.network(*job[:3])).numel() for job in jobs]
    sweep.main(["--output", str(path), "--net", "conv", "--examples", str(SOME)])
    assert [run[1:] for run in measured] == [(2, 1, "initial", SOME), (2, 1, "trained", SOME)]
    assert trainings == [(sizes[1], 1)]
    sweep.main(["--output", str(path)])
    wanted = [Run(*job[:3], state, size) for job in jobs for state in ("initial", "trained") for size in job[3]]
    assert sorted(measured) == sorted(wanted)
    assert trainings[1:] == [(sizes[0], 3), (sizes[1], 1)]
    sweep.main(["--output", str(path)])
    assert (len(measured), len(trainings)) == (8, 3)
    assert "nan" not in path.read_text()  # what is not defined is an empty field
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(f"mlp,4,3,initial,{FEW},")))
    sweep.main(["--output", str(path)])  # no training for the sake of what is measured before it
    assert (len(measured), len(trainings)) == (9, 3)
    assert [type(value) for value in sweep.records(path)[0][:7]] == [str, int, int, str, int, str, int]


def test_help_tells_what_it_costs(capsys):
    with pytest.raises(SystemExit) as stop:
        sweep.main(["--help"])
    assert stop.value.code == 0
    assert "GB of memory" in " ".join(capsys.readouterr().out.split())


def test_bad_input_is_refused(tmp_path):
    path = tmp_path / "other.csv"
    path.write_text("net,width\nmlp,3\n")
    with pytest.raises(ValueError, match="path: expected the columns net, width, seed"):
        sweep.records(path)
    path.write_text(",".join(sorted(Record._fields)) + "\n")
    with pytest.raises(ValueError, match="path: expected the columns"):
        sweep.records(path)
    path.write_text("")
    with pytest.raises(ValueError, match="path: expected the columns"):
        sweep.records(path)
    with pytest.raises(FileNotFoundError):
        sweep.records(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"net: expected one of \['mlp', 'conv'\], got 'rnn'"):
        sweep.network("rnn", 3, 0)
    with pytest.raises(ValueError, match="channels: expected an integer >= 1"):
        sweep.conv_net(0)
    with pytest.raises(ValueError, match="dtype: expected a real floating-point dtype"):
        sweep.conv_net(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"run.examples: expected at most 1348, got 1349"):
        sweep.measure(sweep.network("mlp", 4, 0), Run("mlp", 4, 0, "initial", 1349))
