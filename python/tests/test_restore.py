"""Restoring fills a job in place, or changes nothing and says why."""

from __future__ import annotations

import collections

import numpy
import pytest
import torch
from helpers import assert_same

import strandline


def save_step(directory, state, step=1, **options):
    with strandline.Checkpointer(directory, **options) as checkpointer:
        checkpointer.save(step, state)


def restore(directory, state, allow_pickle=False, **options):
    with strandline.Checkpointer(directory, allow_pickle=allow_pickle) as checkpointer:
        return checkpointer.restore(state, **options)


def test_without_a_checkpoint_the_default_is_returned(tmp_path):
    with strandline.Checkpointer(tmp_path / "none") as checkpointer:
        assert checkpointer.restore({"a": 1}) is None
        assert checkpointer.restore({"a": 1}, default=0) == 0
        assert checkpointer.latest_step() is None
        assert checkpointer.steps() == []
        assert checkpointer.restore({"a": 1}, step=3, default=0) == 0
        assert not (tmp_path / "none").exists()
        checkpointer.save(1, {"a": 1}).wait_durable(60)
        with pytest.raises(strandline.NotFoundError, match="it has, newest first: 1"):
            checkpointer.restore({"a": 1}, step=3, default=0)


def test_tensors_and_arrays_are_filled_in_place(tmp_path):
    save_step(
        tmp_path,
        {
            "w": torch.arange(4.0),
            "view": torch.arange(6.0).reshape(2, 3),
            "n": numpy.arange(3),
            "p": torch.ones(2),
        },
    )
    wide = torch.zeros(3, 2)
    job = {
        "w": torch.zeros(4),
        "view": wide.t(),
        "n": numpy.zeros(3, dtype=int),
        "p": torch.nn.Parameter(torch.zeros(2)),
    }
    before = dict(job)
    assert restore(tmp_path, job) == 1
    for key, value in before.items():
        assert job[key] is value
    assert job["w"].tolist() == [0, 1, 2, 3]
    assert wide.tolist() == [[0, 3], [1, 4], [2, 5]]
    assert job["n"].tolist() == [0, 1, 2]
    assert job["p"].tolist() == [1, 1]
    assert job["p"].requires_grad
    assert job["p"].grad_fn is None


def test_conjugate_and_negative_views_are_filled_through(tmp_path):
    values = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    save_step(tmp_path, {"c": values, "i": torch.tensor([5.0, 6.0])})
    base = torch.zeros(2, dtype=torch.complex64)
    other = torch.zeros(2, dtype=torch.complex64)
    restore(tmp_path, {"c": base.conj(), "i": other.conj().imag})
    assert torch.equal(base.conj(), values)
    assert other.imag.tolist() == [-5, -6]


def test_plain_values_are_assigned_into_the_job(tmp_path):
    save_step(
        tmp_path,
        {
            "epoch": 3,
            "nested": {"lr": 0.5, "name": "adam", "betas": (0.9, 0.99)},
            "history": [1, 2, 3],
            "best": None,
            "later": {"x": torch.ones(2)},
            "counts": collections.Counter("aab"),
        },
    )
    history: list[int] = []
    nested = {"lr": 0.0, "name": "", "betas": (0, 0)}
    later: dict[str, object] = {}
    job = {
        "epoch": 0,
        "nested": nested,
        "history": history,
        "best": 2.0,
        "later": later,
        "counts": collections.Counter(),
    }
    restore(tmp_path, job)
    assert job["epoch"] == 3
    assert job["nested"] is nested == {"lr": 0.5, "name": "adam", "betas": (0.9, 0.99)}
    assert job["history"] is history == [1, 2, 3]
    assert job["best"] is None
    assert job["later"] is later
    assert later["x"].tolist() == [1, 1]
    assert job["counts"] == collections.Counter("aab")


def test_a_none_in_the_job_takes_whatever_was_saved(tmp_path):
    save_step(tmp_path, {"best": {"w": torch.ones(2), "loss": 0.5}})
    job: dict[str, object] = {"best": None}
    restore(tmp_path, job)
    assert_same(job["best"], {"w": torch.ones(2), "loss": 0.5})


def test_all_names_that_do_not_fit_are_listed_and_nothing_is_changed(tmp_path):
    save_step(tmp_path, {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1), "n": 5})
    job = {"a": torch.zeros(2), "b": torch.zeros(4), "d": torch.zeros(1), "e": 1, "n": 0}
    with pytest.raises(strandline.MismatchError) as caught:
        restore(tmp_path, job)
    assert isinstance(caught.value, RuntimeError)
    message = str(caught.value)
    for part in ("b: saved as F32 [3]", "[4]", "d", "e", "c", "strict=False"):
        assert part in message
    assert job["a"].tolist() == [0, 0]
    assert job["n"] == 0


def test_another_dtype_is_refused(tmp_path):
    save_step(tmp_path, {"a": torch.ones(2)})
    for destination in (torch.zeros(2, dtype=torch.float64), numpy.zeros(2, dtype="i4")):
        with pytest.raises(strandline.MismatchError, match="F32"):
            restore(tmp_path, {"a": destination})


def test_without_strict_names_on_one_side_are_left_alone(tmp_path):
    save_step(tmp_path, {"a": torch.ones(2), "gone": {"x": torch.ones(2), "n": 1}, "n": 5})
    job = {"a": torch.zeros(2), "new": torch.zeros(1), "n": 0, "m": 7}
    with pytest.warns(strandline.StrandlineWarning, match="gone"):
        assert restore(tmp_path, job, strict=False) == 1
    assert job["a"].tolist() == [1, 1]
    assert job["new"].tolist() == [0]
    assert job["n"] == 5
    assert job["m"] == 7
    assert "gone" not in job


def test_strict_is_passed_on_to_objects_that_take_it(tmp_path):
    save_step(tmp_path, {"model": torch.nn.Linear(2, 2)})
    bigger = torch.nn.Sequential(collections.OrderedDict(weight=torch.nn.Identity()))
    bigger.register_parameter("bias", torch.nn.Parameter(torch.zeros(2)))
    bigger.register_parameter("extra", torch.nn.Parameter(torch.zeros(1)))
    with pytest.raises(strandline.MismatchError, match=r"model\.extra"):
        restore(tmp_path, {"model": bigger})
    with pytest.warns(strandline.StrandlineWarning, match=r"model\.extra"):
        assert restore(tmp_path, {"model": bigger}, strict=False) == 1
    assert bigger.bias.abs().sum() > 0
    assert bigger.extra.item() == 0


def test_a_read_only_array_is_refused_with_its_key_path(tmp_path):
    save_step(tmp_path, {"g": {"a": numpy.ones(2)}})
    array = numpy.zeros(2)
    array.flags.writeable = False
    with pytest.raises(strandline.InvalidArgumentError, match="read-only") as caught:
        restore(tmp_path, {"g": {"a": array}})
    assert caught.value.key_path == "g.a"
    assert array.tolist() == [0, 0]


def test_two_saved_values_for_one_memory_are_refused_naming_both(tmp_path):
    save_step(tmp_path, {"a": torch.ones(2), "b": torch.zeros(2), "m": torch.nn.Linear(2, 2)})
    shared = torch.full((2,), 7.0)
    with pytest.raises(strandline.MismatchError) as caught:
        restore(tmp_path, {"a": shared, "b": shared, "m": torch.nn.Linear(2, 2)})
    assert "'a'" in str(caught.value)
    assert "'b'" in str(caught.value)
    assert shared.tolist() == [7, 7]


def test_a_model_tied_after_it_was_saved_untied_is_refused(tmp_path):
    class Model(torch.nn.Module):
        def __init__(self, tied):
            super().__init__()
            self.a = torch.nn.Linear(3, 3, bias=False)
            self.b = torch.nn.Linear(3, 3, bias=False)
            if tied:
                self.b.weight = self.a.weight

    save_step(tmp_path / "untied", {"model": Model(tied=False)})
    with pytest.raises(strandline.MismatchError, match=r"model\.a\.weight"):
        restore(tmp_path / "untied", {"model": Model(tied=True)})
    tied = Model(tied=True)
    save_step(tmp_path / "tied", {"model": tied})
    again = Model(tied=True)
    restore(tmp_path / "tied", {"model": again})
    assert torch.equal(again.b.weight, tied.a.weight)
    assert again.b.weight is again.a.weight


def test_an_object_is_loaded_from_its_own_tensors(tmp_path):
    class Holder:
        def __init__(self, value):
            self.tensor = torch.full((2,), value)
            self.extra = {"n": value}
            self.given = None

        def state_dict(self):
            return {"tensor": self.tensor, "extra": self.extra, "empty": {}}

        def load_state_dict(self, state):
            self.given = state

    saved = Holder(1.0)
    save_step(tmp_path, {"h": saved})
    holder = Holder(0.0)
    tensor = holder.tensor
    restore(tmp_path, {"h": holder})
    assert holder.given["tensor"] is tensor
    assert tensor.tolist() == [1, 1]
    assert holder.given["extra"] == {"n": 1.0}
    assert holder.extra == {"n": 0.0}


def test_objects_in_lists_are_loaded(tmp_path):
    models = [torch.nn.Linear(2, 2) for _ in range(2)]
    save_step(tmp_path, {"models": models, "pair": (models[0], {"n": 1})})
    fresh = [torch.nn.Linear(2, 2) for _ in range(2)]
    job = {"models": list(fresh), "pair": (fresh[0], {"n": 0})}
    restore(tmp_path, job)
    assert job["models"] == fresh
    assert job["pair"][0] is fresh[0]
    assert job["pair"][1] == {"n": 1}
    for old, new in zip(models, fresh, strict=False):
        assert torch.equal(old.weight, new.weight)


def test_tensors_in_lists_are_filled_in_place(tmp_path):
    save_step(tmp_path, {"params": [torch.ones(2), {"w": torch.ones(3)}], "n": [1, 2]})
    params = [torch.zeros(2), {"w": torch.zeros(3)}]
    first, second = params[0], params[1]["w"]
    restore(tmp_path, {"params": params, "n": [1, 2, 3]})
    assert params[0] is first
    assert first.tolist() == [1, 1]
    assert params[1]["w"] is second
    assert second.tolist() == [1, 1, 1]


def test_a_list_with_a_tensor_of_another_shape_is_refused(tmp_path):
    save_step(tmp_path, {"params": [torch.ones(2), torch.ones(2)]})
    params = [torch.zeros(2), torch.zeros(3)]
    with pytest.raises(strandline.MismatchError, match=r"params\.1"):
        restore(tmp_path, {"params": params})
    assert params[0].tolist() == [0, 0]


def test_a_list_of_another_length_takes_what_was_saved(tmp_path):
    save_step(tmp_path, {"window": [torch.ones(2), torch.ones(2)]})
    window = [torch.zeros(5)]
    restore(tmp_path, {"window": window})
    assert_same(window, [torch.ones(2), torch.ones(2)])


def test_an_error_of_an_object_comes_out_as_ours_with_it_as_cause(tmp_path):
    class Picky:
        def state_dict(self):
            return {"n": 1}

        def load_state_dict(self, state):
            raise KeyError("picky")

    save_step(tmp_path, {"a": {"p": Picky()}})
    with pytest.raises(strandline.Error, match="picky") as caught:
        restore(tmp_path, {"a": {"p": Picky()}})
    assert caught.value.key_path == "a.p"
    assert isinstance(caught.value.__cause__, KeyError)


def test_an_object_that_cannot_load_is_refused_before_anything_changes(tmp_path):
    class SaveOnly:
        def state_dict(self):
            return {"n": 1}

    save_step(tmp_path, {"w": torch.ones(1), "s": SaveOnly()})
    job = {"w": torch.zeros(1), "s": SaveOnly()}
    with pytest.raises(strandline.UnsupportedError, match="load_state_dict") as caught:
        restore(tmp_path, job)
    assert caught.value.key_path == "s"
    assert job["w"].item() == 0
    assert strandline.load(tmp_path, keys="s") == {"n": 1}


def test_a_job_may_be_one_object(tmp_path):
    model = torch.nn.Linear(2, 2)
    save_step(tmp_path, model)
    fresh = torch.nn.Linear(2, 2)
    assert restore(tmp_path, fresh) == 1
    assert torch.equal(model.weight, fresh.weight)


def test_a_pickle_is_restored_only_with_permission(tmp_path):
    import fractions

    save_step(tmp_path, {"f": fractions.Fraction(1, 3)}, allow_pickle=True)
    with pytest.raises(strandline.UnsupportedError, match="allow_pickle") as caught:
        restore(tmp_path, {"f": None})
    assert caught.value.key_path == "f"
    job = {"f": None}
    restore(tmp_path, job, allow_pickle=True)
    assert job["f"] == fractions.Fraction(1, 3)


def flip_byte(file, at=-1):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_with_a_warning_at_the_caller(tmp_path):
    with strandline.Checkpointer(tmp_path) as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"w": torch.full((2,), float(step))})
    flip_byte(tmp_path / "step-00000002" / "state-00001-of-00001.safetensors")
    job = {"w": torch.zeros(2)}
    with strandline.Checkpointer(tmp_path) as checkpointer:
        with pytest.warns(strandline.StrandlineWarning, match="step-00000002") as caught:
            assert checkpointer.restore(job) == 1
    assert caught[0].filename == __file__
    assert job["w"].tolist() == [1, 1]
    with pytest.warns(strandline.StrandlineWarning, match="step-00000002") as caught:
        assert strandline.load(tmp_path)["w"].tolist() == [1, 1]
    assert caught[0].filename == __file__
    with pytest.raises(strandline.CorruptError, match="w") as corrupt:
        strandline.load(tmp_path, step=2)
    assert isinstance(corrupt.value, RuntimeError)


def test_verifying_first_changes_nothing_on_damage(tmp_path):
    save_step(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)})
    flip_byte(tmp_path / "step-00000001" / "state-00001-of-00001.safetensors")
    job = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with strandline.Checkpointer(tmp_path) as checkpointer:
        with pytest.raises(strandline.CorruptError):
            checkpointer.restore(job, verify_first=True)
    assert job["a"].tolist() == [0, 0]
    assert job["b"].tolist() == [0, 0]


class Counting:
    """An object that keeps what it was given."""

    def __init__(self, n=0):
        self.n = n
        self.loads = 0

    def state_dict(self):
        return {"n": self.n}

    def load_state_dict(self, state):
        self.n = state["n"]
        self.loads += 1


@pytest.mark.parametrize("saved_as", [dict, collections.OrderedDict])
@pytest.mark.parametrize("here_as", [dict, collections.OrderedDict])
def test_dicts_of_all_kinds_are_alike(tmp_path, saved_as, here_as):
    model = torch.nn.Linear(2, 2)
    save_step(tmp_path, saved_as(o=Counting(3), n=5, m=model, x=saved_as(o=Counting(4), n=6)))
    fresh, one, other = torch.nn.Linear(2, 2), Counting(), Counting()
    job = here_as(o=one, n=0, m=fresh, x=here_as(o=other, n=0))
    inner = job["x"]
    assert restore(tmp_path, job) == 1
    assert type(job) is here_as
    assert (job["o"], job["n"], job["m"], job["x"]) == (one, 5, fresh, inner)
    assert (inner["o"], inner["n"]) == (other, 6)
    assert (one.n, one.loads, other.n, other.loads) == (3, 1, 4, 1)
    assert torch.equal(fresh.weight, model.weight)


def test_a_counter_takes_what_a_dict_was_saved_with(tmp_path):
    save_step(tmp_path, {"full": {"a": 2}, "empty": {"b": 3}})
    job = {"full": collections.Counter("a"), "empty": collections.Counter()}
    restore(tmp_path, job)
    assert job["full"] == collections.Counter("aa")
    assert job["empty"] == collections.Counter("bbb")


@pytest.mark.parametrize("saved_as", [list, tuple])
@pytest.mark.parametrize("here_as", [list, tuple])
def test_lists_and_tuples_are_alike(tmp_path, saved_as, here_as):
    save_step(tmp_path, {"x": saved_as([Counting(3), 5, torch.ones(2)]), "plain": saved_as([1, 2])})
    one, tensor = Counting(), torch.zeros(2)
    job = {"x": here_as([one, 0, tensor]), "plain": here_as([0])}
    before = job["x"]
    restore(tmp_path, job)
    assert type(job["x"]) is here_as
    assert job["x"][0] is one
    assert job["x"][1] == 5
    assert job["x"][2] is tensor
    assert (one.n, one.loads) == (3, 1)
    assert tensor.tolist() == [1, 1]
    assert list(job["plain"]) == [1, 2]
    if here_as is list:
        assert job["x"] is before


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_list_with_objects_of_another_length_is_refused(tmp_path, count):
    save_step(
        tmp_path,
        {"models": [torch.nn.Linear(2, 2) for _ in range(count)], "w": torch.ones(2), "n": 1},
    )
    models = [torch.nn.Linear(2, 2) for _ in range(2)]
    job = {"models": list(models), "w": torch.zeros(2), "n": 0}
    for strict in (True, False):
        with pytest.raises(strandline.MismatchError, match=f"models: .* length {count}, .* 2 "):
            restore(tmp_path, job, strict=strict)
    assert job["models"] == models
    assert (job["w"].tolist(), job["n"]) == ([0, 0], 0)


@pytest.mark.parametrize("saved", [5, [1], torch.ones(2), None])
def test_an_object_takes_nothing_but_a_dict(tmp_path, saved):
    class Empty(Counting):
        def state_dict(self):
            return {}

    save_step(tmp_path, {"e": saved, "o": [saved], "w": torch.ones(2)})
    empty, one = Empty(), Counting()
    job = {"e": empty, "o": [one], "w": torch.zeros(2)}
    with pytest.raises(strandline.MismatchError) as caught:
        restore(tmp_path, job)
    assert "e: saved as" in str(caught.value)
    assert "o.0: saved as" in str(caught.value)
    assert (empty.loads, one.loads, job["w"].tolist()) == (0, 0, [0, 0])


def test_a_list_without_objects_is_replaced_whole(tmp_path):
    save_step(
        tmp_path,
        {"log": [{"a": 3, "c": 4}], "pair": ({"a": 1}, 2), "deep": [torch.ones(1), [{"c": 4}]]},
    )
    log, tensor = [{"a": 1, "b": 2}], torch.zeros(1)
    job = {"log": log, "pair": ({"b": 0}, 0), "deep": [tensor, [{"b": 2}]]}
    restore(tmp_path, job)
    assert job["log"] is log
    assert log == [{"a": 3, "c": 4}]
    assert job["pair"] == ({"a": 1}, 2)
    assert job["deep"][0] is tensor
    assert job["deep"][1] == [{"c": 4}]


def test_names_of_dicts_in_a_list_with_tensors_are_compared(tmp_path):
    save_step(tmp_path, {"groups": [{"w": torch.ones(2), "c": 1}]})
    groups = [{"w": torch.zeros(2), "b": 0}]
    with pytest.raises(strandline.MismatchError, match=r"groups\.0\.b"):
        restore(tmp_path, {"groups": groups})
    assert groups[0]["w"].tolist() == [0, 0]


def test_a_growing_list_inside_of_an_object_is_the_objects_own(tmp_path):
    class History(Counting):
        def __init__(self, length):
            super().__init__()
            self.parts = [Counting(i) for i in range(length)]

        def state_dict(self):
            return {"parts": self.parts}

        def load_state_dict(self, state):
            self.parts = state["parts"]

    save_step(tmp_path, {"history": History(3)})
    history = History(1)
    restore(tmp_path, {"history": history})
    assert history.parts == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_plain_values_are_checked_before_anything_is_changed(tmp_path):
    import fractions

    save_step(tmp_path, {"w": torch.ones(2), "f": fractions.Fraction(1, 3)}, allow_pickle=True)
    job = {"w": torch.zeros(2), "f": None}
    with pytest.raises(strandline.UnsupportedError, match="allow_pickle") as caught:
        restore(tmp_path, job)
    assert caught.value.key_path == "f"
    assert (job["w"].tolist(), job["f"]) == ([0, 0], None)
    restore(tmp_path, job, allow_pickle=True)
    assert (job["w"].tolist(), job["f"]) == ([1, 1], fractions.Fraction(1, 3))


class Fragile:
    """Can be pickled, and not be loaded: as if its code had changed meanwhile."""

    loads = 0

    def __reduce__(self):
        return _break, ()


def _break():
    Fragile.loads += 1
    raise LookupError("gone")


def test_a_pickle_that_fails_changes_nothing_and_is_loaded_once(tmp_path):
    save_step(tmp_path, {"w": torch.ones(2), "f": Fragile()}, allow_pickle=True)
    job = {"w": torch.zeros(2), "f": None}
    Fragile.loads = 0
    with pytest.raises(strandline.UnsupportedError) as caught:
        restore(tmp_path, job, allow_pickle=True)
    assert caught.value.key_path == "f"
    assert isinstance(caught.value.__cause__, LookupError)
    assert Fragile.loads == 1
    assert job["w"].tolist() == [0, 0]


def test_without_strict_one_warning_at_the_caller_lists_the_names(tmp_path):
    save_step(tmp_path, {"a": torch.ones(2), "gone": {"x": torch.ones(2)}, "n": 5})
    job = {"a": torch.zeros(2), "new": torch.zeros(1), "m": 7}
    with strandline.Checkpointer(tmp_path) as checkpointer:
        with pytest.warns(strandline.StrandlineWarning) as caught:
            checkpointer.restore(job, strict=False)
    (warning,) = caught
    assert warning.filename == __file__
    message = str(warning.message)
    assert "missing from the checkpoint (2): new, m" in message
    assert "only in the checkpoint (2): gone, n" in message


@pytest.mark.filterwarnings("error")
def test_without_strict_nothing_is_said_if_all_names_are_there(tmp_path):
    save_step(tmp_path, {"a": torch.ones(2)})
    assert restore(tmp_path, {"a": torch.zeros(2)}, strict=False) == 1
