"""Stock training states: saved without a switch, right at the call, resumed bit for bit."""

from __future__ import annotations

import inspect
import random

import numpy
import pytest
import torch
from helpers import assert_same, bits_of

import strandline

OPTIMIZERS = [
    cls
    for _, cls in inspect.getmembers(torch.optim, inspect.isclass)
    if issubclass(cls, torch.optim.Optimizer) and cls is not torch.optim.Optimizer
]


def make_optimizer(cls, model):
    if cls is torch.optim.SparseAdam:
        return cls(list(model.parameters()), lr=0.01)
    if cls.__name__ == "Muon":  # For matrices only.
        return cls([p for p in model.parameters() if p.ndim == 2], lr=0.01)
    return cls(model.parameters(), lr=0.01)


def make_model(cls):
    torch.manual_seed(0)
    if cls is torch.optim.SparseAdam:
        return torch.nn.Embedding(5, 3, sparse=True)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def train_step(model, optimizer):
    def closure():
        optimizer.zero_grad()
        if isinstance(model, torch.nn.Embedding):
            loss = model(torch.tensor([1, 3])).square().sum()
        else:
            loss = model(torch.tensor([[1.0, 2.0, 3.0]])).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("cls", OPTIMIZERS, ids=lambda cls: cls.__name__)
def test_every_stock_optimizer_resumes_bit_for_bit(tmp_path, cls):
    model = make_model(cls)
    optimizer = make_optimizer(cls, model)
    for _ in range(2):
        train_step(model, optimizer)
    with strandline.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, {"model": model, "optimizer": optimizer})
    assert_same(optimizer.state_dict(), strandline.load(tmp_path, keys="optimizer"))

    other = make_model(cls)
    other_optimizer = make_optimizer(cls, other)
    with strandline.Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.restore({"model": other, "optimizer": other_optimizer}) == 2
    for _ in range(2):
        train_step(model, optimizer)
        train_step(other, other_optimizer)
    assert_same(model.state_dict(), other.state_dict())
    assert_same(optimizer.state_dict(), other_optimizer.state_dict())


SCHEDULERS = {
    "LambdaLR": lambda s, o: s.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda s, o: s.MultiplicativeLR(o, lambda epoch: 0.9),
    "StepLR": lambda s, o: s.StepLR(o, 2),
    "MultiStepLR": lambda s, o: s.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda s, o: s.ConstantLR(o),
    "LinearLR": lambda s, o: s.LinearLR(o),
    "ExponentialLR": lambda s, o: s.ExponentialLR(o, 0.9),
    "CosineAnnealingLR": lambda s, o: s.CosineAnnealingLR(o, 5),
    "PolynomialLR": lambda s, o: s.PolynomialLR(o),
    "CyclicLR": lambda s, o: s.CyclicLR(o, 0.01, 0.1),
    "CosineAnnealingWarmRestarts": lambda s, o: s.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda s, o: s.OneCycleLR(o, 0.1, total_steps=10),
    "ReduceLROnPlateau": lambda s, o: s.ReduceLROnPlateau(o),
    "SequentialLR": lambda s, o: s.SequentialLR(
        o, [s.ConstantLR(o), s.ExponentialLR(o, 0.9)], milestones=[2]
    ),
    "ChainedScheduler": lambda s, o: s.ChainedScheduler([s.ConstantLR(o), s.StepLR(o, 2)]),
}


def test_every_stock_scheduler_is_covered():
    module = torch.optim.lr_scheduler
    stock = {
        name
        for name, cls in inspect.getmembers(module, inspect.isclass)
        if issubclass(cls, module.LRScheduler) and cls.__module__ == module.__name__
    } - {"LRScheduler", "_LRScheduler"}
    assert stock == set(SCHEDULERS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_stock_scheduler_resumes(tmp_path, name):
    def make():
        model = torch.nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return optimizer, SCHEDULERS[name](torch.optim.lr_scheduler, optimizer)

    def step(optimizer, scheduler):
        optimizer.step()
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))

    optimizer, scheduler = make()
    for _ in range(3):
        step(optimizer, scheduler)
    with strandline.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(3, {"o": optimizer, "s": scheduler})
    other_optimizer, other = make()
    with strandline.Checkpointer(tmp_path) as checkpointer:
        checkpointer.restore({"o": other_optimizer, "s": other})
    for _ in range(4):
        step(optimizer, scheduler)
        step(other_optimizer, other)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [group["lr"] for group in other_optimizer.param_groups]


def test_a_grad_scaler_and_an_averaged_model_come_back(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    scaler.scale(torch.zeros(1))
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2))
    averaged.update_parameters(torch.nn.Linear(2, 2))
    with strandline.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"scaler": scaler, "averaged": averaged})
    other = torch.amp.GradScaler("cpu", init_scale=2.0)
    other_averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2))
    with strandline.Checkpointer(tmp_path) as checkpointer:
        checkpointer.restore({"scaler": other, "averaged": other_averaged})
    assert other.state_dict() == scaler.state_dict()
    assert_same(averaged.state_dict(), other_averaged.state_dict())


def make_job():
    torch.manual_seed(7)
    random.seed(7)
    numpy.random.seed(7)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.3), torch.nn.Linear(8, 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return {
        "model": model,
        "optimizer": optimizer,
        "schedule": torch.optim.lr_scheduler.StepLR(optimizer, 2),
        "rng": strandline.torch.RngState(),
        "history": [],
    }


def train(job):
    inputs = torch.randn(6, 4) * random.random() + float(numpy.random.rand())
    loss = job["model"](inputs).square().mean()
    job["optimizer"].zero_grad()
    loss.backward()
    job["optimizer"].step()
    job["schedule"].step()
    job["history"].append(loss.item())


def test_a_resumed_job_goes_on_bit_for_bit(tmp_path):
    straight = make_job()
    for _ in range(10):
        train(straight)

    job = make_job()
    with strandline.Checkpointer(tmp_path, keep=2) as checkpointer:
        assert checkpointer.restore(job, default=0) == 0
        for done in range(1, 6):
            train(job)
            checkpointer.save(done, job)
    job = make_job()
    random.random(), numpy.random.rand(), torch.randn(3)  # Off the track.
    with strandline.Checkpointer(tmp_path, keep=2) as checkpointer:
        done = checkpointer.restore(job, default=0)
        assert done == 5
        assert checkpointer.steps() == [4, 5]
        for _ in range(done, 10):
            train(job)
    assert job["history"] == straight["history"]
    for name in ("model", "optimizer", "schedule"):
        assert_same(straight[name].state_dict(), job[name].state_dict())


def test_rng_state_draws_from_no_generator(tmp_path):
    def states():
        return (torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state()))

    job = {"rng": strandline.torch.RngState(), "w": torch.zeros(1000)}
    before = states()
    with strandline.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, job).wait_durable(60)
        assert states() == before
        strandline.load(tmp_path)
        assert states() == before
        checkpointer.restore(job)
    assert states() == before


def test_rng_state_comes_back_for_every_generator(tmp_path):
    def draw():
        return (
            torch.randn(3).tolist(),
            random.random(),
            random.gauss(0, 1),
            numpy.random.rand(),
            numpy.random.standard_normal(),
        )

    job = {"rng": strandline.torch.RngState()}
    random.gauss(0, 1), numpy.random.standard_normal()  # Leaves a second value for the next call.
    with strandline.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, job).wait_durable(60)
        expected = draw()
        draw()
        checkpointer.restore(job)
        assert draw() == expected


def test_generators_are_set_after_objects_that_draw_while_they_load(tmp_path):
    class Drawing:
        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            torch.randn(5)

    job = {"rng": strandline.torch.RngState(), "drawing": Drawing()}
    with strandline.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, job).wait_durable(60)
        expected = torch.randn(3)
        checkpointer.restore(job)
    assert torch.equal(torch.randn(3), expected)


def test_the_random_state_of_a_missing_accelerator_is_passed_over_with_a_warning():
    state = strandline.torch.RngState().state_dict()
    state["accelerator"] = [("cuda", 63, b"\0" * 16)]
    with pytest.warns(strandline.StrandlineWarning, match="cuda:63"):
        strandline.torch.RngState().load_state_dict(state)


# ---- The state at the call ----


def fused_adamw_step():
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def write():
        model(torch.ones(2, 300)).sum().backward()
        optimizer.step()

    write()
    return {"model": model, "optimizer": optimizer}, write


def batch_norm_forward():
    model = torch.nn.BatchNorm1d(300)

    def write():
        model(torch.rand(4, 300))

    return {"model": model}, write


def data_write():
    parameter = torch.nn.Parameter(torch.zeros(300, 300))
    count = iter(range(1, 10))

    def write():
        parameter.data.fill_(next(count))

    return {"p": parameter}, write


def data_swap():
    parameter = torch.nn.Parameter(torch.zeros(300, 300))
    count = iter(range(1, 10))

    def write():
        parameter.data = torch.full((300, 300), float(next(count)))

    return {"p": parameter}, write


def numpy_write():
    array = numpy.zeros((300, 300))
    tensor = torch.from_numpy(array)
    count = iter(range(1, 10))

    def write():
        array[:] = next(count)

    return {"array": array, "tensor": tensor}, write


def conjugate_view():
    base = torch.zeros(300, dtype=torch.complex64)
    count = iter(range(1, 10))

    def write():
        base.fill_(complex(0, next(count)))

    return {"view": base.conj(), "imag": base.conj().imag}, write


def freed_storage():
    tensor = torch.ones(100_000)
    state = {"t": tensor}
    writes = iter([lambda: None, lambda: tensor.untyped_storage().resize_(0)])

    def write():
        next(writes)()

    return state, write


@pytest.mark.parametrize(
    "make",
    [
        fused_adamw_step,
        batch_norm_forward,
        data_write,
        data_swap,
        numpy_write,
        conjugate_view,
        freed_storage,
    ],
)
def test_a_checkpoint_holds_the_state_at_the_call(tmp_path, make):
    state, write = make()
    write()
    plain = {
        key: value.state_dict() if hasattr(value, "state_dict") else value
        for key, value in state.items()
    }
    expected = [bits_of(torch.as_tensor(leaf)) for leaf in leaves(plain)]
    with strandline.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        write()  # At once, while the save is being written.
    saved = [bits_of(torch.as_tensor(leaf)) for leaf in leaves(strandline.load(tmp_path))]
    assert len(expected) > 0
    assert saved == expected


def leaves(tree):
    if isinstance(tree, dict):
        return [leaf for value in tree.values() for leaf in leaves(value)]
    if isinstance(tree, (list, tuple)):
        return [leaf for value in tree for leaf in leaves(value)]
    return [tree] if isinstance(tree, (torch.Tensor, numpy.ndarray)) else []


def test_weights_untied_between_saves_find_another_plan(tmp_path):
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    with strandline.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"model": model})
        model["b"].weight = torch.nn.Parameter(torch.full((3, 3), 9.0))
        checkpointer.save(2, {"model": model})
    tied = strandline.load(tmp_path, keys="model", step=1)
    untied = strandline.load(tmp_path, keys="model", step=2)
    assert torch.equal(tied["a.weight"], tied["b.weight"])
    assert torch.all(untied["b.weight"] == 9)
    assert torch.equal(untied["a.weight"], tied["a.weight"])
