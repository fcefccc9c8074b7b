"""On what a compiled engine is trusted: right numbers pass, wrong or changing ones do not, at the steps of a real test.

The verdict on a GPU engine comes from a process of its own and is kept in the user's cache.
"""

import importlib.util
import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from problems import FORMULAS

from common.recurrence import agreement, engine_for, native_build, triton_engine
from common.recurrence.agreement import ChildFailed, disagreement, errors, in_child, problem, solve, verdict
from common.recurrence.torch_engine import sequence_recurrence
from common.stair import LearnedStair, Nonlinearity, stair_activation

IEEE, TF32, DOUBLE = (torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float64, "ieee")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


class Rounded(torch.autograd.Function):
    """a @ b as a GPU forms it with tf32: both to 11 bits, forward and backward."""

    @staticmethod
    def round(t):
        return ((t.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return Rounded.round(a) @ Rounded.round(b)

    @staticmethod
    def backward(ctx, grad):
        a, b = map(Rounded.round, ctx.saved_tensors)
        return Rounded.round(grad) @ b.t(), a.t() @ Rounded.round(grad)


def loop(multiply, stale=None):
    """An engine: a plain loop with another product. At the step `stale` the first row still sees the state before."""
    def engine(x, kernel, h0, numbers, rule, phi, bias, last_only):
        states = [h0]
        for t in range(len(x)):
            h = torch.cat((states[-2][:1], states[-1][1:])) if t == stale else states[-1]
            states.append(stair_activation(x[t] + multiply(h, kernel), numbers[t], rule, phi, bias))
        return states[-1] if last_only else torch.stack(states[1:])
    return engine


RIGHT = {IEEE: sequence_recurrence, TF32: loop(Rounded.apply), DOUBLE: sequence_recurrence}


def wrong_in(engine, kind, rule="scale", phi="modrelu", **given):
    """The gate at its own number of steps; the repetitions, which only show changing bits, are few."""
    return disagreement(engine, 3, 19, rule, phi, *kind, **{"repetitions": 1, **given})


@pytest.mark.parametrize("kind", RIGHT, ids=["float32", "tf32", "float64"])
@pytest.mark.parametrize(("rule", "phi"), FORMULAS)
def test_a_right_engine_passes(rule, phi, kind):
    assert wrong_in(RIGHT[kind], kind, rule, phi) is None


@pytest.mark.parametrize(("batch", "hidden", "steps"), [(1, 1, 150), (2, 5, 150), (10, 128, 150), (3, 19, 784)])
def test_a_right_engine_passes_at_other_sizes(batch, hidden, steps):
    """After 784 steps nothing is left of the gradient of h0 that float32 could hold."""
    for kind in (IEEE, TF32):
        assert disagreement(RIGHT[kind], batch, hidden, "scale", "tanh", *kind, steps=steps, repetitions=1) is None


def test_fewer_bits_are_found():
    assert "is off by" in wrong_in(RIGHT[TF32], IEEE)
    assert "is off by" in wrong_in(loop(lambda a, b: (a.bfloat16() @ b.bfloat16()).float()), TF32)


NAMES = ("x", "W", "h0", "numbers", "bias")


def scaled(name, factor, when):
    """The right values, and a gradient of one input times `factor`; `when`: the last_only for which it is so."""
    def change(given):
        place = NAMES.index(name)
        given[place] = factor * given[place] + (1 - factor) * given[place].detach()
        return given
    return lambda engine: changed(engine, change, when)


def changed(engine, change, when=(False, True)):
    def wrong(x, kernel, h0, numbers, rule, phi, bias, last_only):
        given = [x, kernel, h0, numbers, bias]
        given = change(given) if last_only in when else given
        return engine(*given[:4], rule, phi, given[4], last_only)
    return wrong


def one_step_off(given):
    return [*given[:3], given[3].roll(1), given[4]]


WRONG = {**{f"the sign of the gradient of {name}": scaled(name, -1, (False, True)) for name in NAMES},
         **{f"a tenth of the gradient of {name}": scaled(name, 0.9, (False, True)) for name in NAMES},
         **{f"a tenth of the gradient of {name}, last only": scaled(name, 0.9, (True,)) for name in NAMES},
         "the sign of h": lambda engine: lambda *given: -engine(*given),
         "one step off": lambda engine: changed(engine, one_step_off),
         "the last step off": lambda engine: changed(
             engine, lambda given: [*given[:3], torch.cat((given[3][:-1], given[3][-2:-1])), given[4]], (True,))}


@pytest.mark.parametrize("kind", RIGHT, ids=["float32", "tf32", "float64"])
@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_engine_does_not_pass(what, kind):
    found = wrong_in(WRONG[what](RIGHT[kind]), kind)
    assert "is off by" in found
    if "gradient of" in what:
        assert found.startswith(f"the gradient of {what.split('gradient of ')[1].split(',')[0]} is off")


@pytest.mark.parametrize("multiply", [torch.matmul, Rounded.apply])
@pytest.mark.parametrize("stale", [1, 75, 149])
def test_one_stale_read_does_not_pass(stale, multiply):
    kind = IEEE if multiply is torch.matmul else TF32
    assert wrong_in(loop(multiply), kind) is None
    assert "is off by" in wrong_in(loop(multiply, stale), kind)


def test_a_thousandth_is_found_in_float32():
    wrong = scaled("W", 0.999, (False, True))(sequence_recurrence)
    assert "the gradient of W is off by 1.0e-03 of its largest number" in wrong_in(wrong, IEEE)


def test_changing_bits_are_found():
    calls = []

    def changing(x, *given):
        calls.append(1)
        return sequence_recurrence(x * (1 + 1e-7 * (len(calls) == 12)), *given)

    assert "other bits" in wrong_in(changing, IEEE, repetitions=20)


def test_what_is_not_finite_does_not_pass():
    for value in (float("nan"), float("inf")):
        assert "is off by" in wrong_in(lambda *given, v=value: v * sequence_recurrence(*given), IEEE)


def test_a_gradient_that_fades_to_nothing_counts_as_nothing():
    given = problem(784, 2, 5, "scale", "modrelu", torch.float32, "cpu")
    found = solve(sequence_recurrence, given, "scale", "modrelu", True)
    assert errors(found, given, "scale", "modrelu", True, 1e-4)["h0"] == 0


def test_a_child_gives_what_the_function_gives():
    assert in_child("operator", "add", [1, "é"], [None]) == [1, "é", None]


@pytest.mark.parametrize(("call", "told", "is_verdict"), [
    (("os", "abort"), "it ended with signal 6", True), (("sys", "exit", 3), "it ended with status 3", True),
    (("operator", "truediv", 1, 0), "ZeroDivisionError: division by zero", True),
    (("signal", "raise_signal", 9), "it ended with signal 9", False), (("time", "sleep", 60), "within 1 s", True)])
def test_how_a_child_ended(call, told, is_verdict):
    began = time.monotonic()
    with pytest.raises(ChildFailed, match=told) as error:
        in_child(*call, seconds=1 if "sleep" in call else 60)
    assert error.value.told == is_verdict
    assert time.monotonic() - began < 50


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if importlib.util.find_spec("triton"):
        triton_engine._kernels()                    # before the variable, which decides at their import what they are
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))                       # where children find `now`
    native_build.say_once.cache_clear()
    triton_engine.is_right.cache_clear()
    yield tmp_path / "stair-rnn"
    triton_engine.is_right.cache_clear()


def test_a_verdict_is_kept_for_what_it_is_about(cache, capsys):
    """A trial that gives another number every time: the time."""
    def ask(about):
        return verdict("x", about, "stair: testing", "test_agreement", "now")[0]["plan"]

    first, other = ask([1]), ask([2])
    assert first != other
    assert [ask([1]), ask([2]), ask([1])] == [first, other, first]
    assert verdict("x", [3]) == ({}, None)
    assert capsys.readouterr().err == "stair: testing\n"
    for path in cache.glob("*.json"):
        path.write_text(path.read_text()[:20])                                        # a disk that was full
    assert ask([1]) not in (first, other)


def now():
    return {"reason": None, "plan": time.time()}


def asked(monkeypatch, result):
    """Whether the triton engine is right, where its trial gives `result`; as two new processes ask."""
    calls = []

    def child(*given, seconds):
        calls.append(given)
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(agreement, "in_child", child)
    answers = []
    for _ in range(2):
        triton_engine.is_right.cache_clear()
        answers.append(triton_engine.is_right(3, 19, "scale", "modrelu", torch.float32, torch.device("cpu"), "ieee"))
    assert answers[0] == answers[1]
    return answers[0], len(calls)


@needs_triton
def test_a_right_gpu_engine_is_tested_once(cache, monkeypatch, capsys):
    assert asked(monkeypatch, {"reason": None, "plan": 0}) == (True, 1)
    assert capsys.readouterr().err == "stair: testing the triton engine for B 3, H 19: up to a minute, once on " \
                                      "this GPU\n"


@needs_triton
@pytest.mark.parametrize("result", [{"reason": "h is off"}, ChildFailed("it ended with status 1: CUDA error: trap")])
def test_a_failed_verdict_names_the_file_to_delete(cache, monkeypatch, capsys, result):
    assert asked(monkeypatch, result) == (False, 1)
    path, = cache.glob("*.json")
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("stair: running the PyTorch engine; triton: ")
    assert line.endswith(f"; delete {path} to test it again")
    path.unlink()
    assert asked(monkeypatch, {"reason": None, "plan": 0}) == (True, 1)


@needs_triton
@pytest.mark.parametrize("result", [{"untested": "this GPU takes no second process"},
                                    ChildFailed("no process could be started for it", told=False)])
def test_what_could_not_be_tested_is_asked_again(cache, monkeypatch, capsys, result):
    assert asked(monkeypatch, result) == (False, 2)
    assert list(cache.glob("*.json")) == []
    assert len(capsys.readouterr().err.splitlines()) == 2


@needs_triton
def test_another_case_is_another_verdict(cache, monkeypatch):
    monkeypatch.setattr(agreement, "in_child", lambda *given, seconds: {"reason": None, "plan": 0})
    cases = [(3, 19, "scale", "modrelu", torch.float32, "ieee"), (4, 19, "scale", "modrelu", torch.float32, "ieee"),
             (3, 20, "scale", "modrelu", torch.float32, "ieee"), (3, 19, "literal", "modrelu", torch.float32, "ieee"),
             (3, 19, "scale", "tanh", torch.float32, "ieee"), (3, 19, "scale", "modrelu", torch.float64, "ieee"),
             (3, 19, "scale", "modrelu", torch.float32, "tf32")]
    for *case, precision in cases:
        assert triton_engine.is_right(*case, torch.device("cpu"), precision)
    kept = [json.loads(path.read_text()) for path in cache.glob("*.json")]
    assert len({json.dumps(verdict["about"]) for verdict in kept}) == len(cases)


@needs_triton
@pytest.mark.parametrize(("wrong", "found"), [
    ({}, {"reason": None, "plan": 1}), ({1: "h is off"}, {"reason": None, "plan": 0}),
    ({0: "h is off"}, {"reason": "h is off", "plan": 0})])
def test_the_fastest_plan_of_those_that_are_right(monkeypatch, wrong, found):
    """psMNIST's: row blocks of 8 are best by counting, of 4 faster here; the first one has to be right."""
    places = {}

    def disagree(engine, *case, **given):
        return wrong.get(places.setdefault(engine.keywords["plan"], len(places)))

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(triton_engine, "disagreement", disagree)
    monkeypatch.setattr(triton_engine, "_seconds", lambda engine, *given: engine.keywords["plan"].rows)
    assert triton_engine.trial(100, 512, "scale", "modrelu", "torch.float32", "cpu", "ieee") == found
    assert [plan.rows for plan in places] == [8, 4][:1 if 0 in wrong else 2]


def test_auto_on_a_gpu_takes_the_engine_that_is_right(monkeypatch):
    answers = {}
    monkeypatch.setattr(triton_engine, "is_right", lambda *case: answers.setdefault(case, len(answers) == 0))
    x = SimpleNamespace(shape=(5, 3, 19), dtype=torch.float32, device=torch.device("cuda", 0))
    for engine in ("triton", "torch"):
        assert engine_for(x, LearnedStair(5), Nonlinearity("modrelu" if engine == "triton" else "tanh", 19)) == engine
    assert [case[:4] for case in answers] == [(3, 19, "scale", "modrelu"), (3, 19, "scale", "tanh")]
