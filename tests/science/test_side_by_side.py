"""Training side by side: the scripts' own `main` and the program of `formulas.py`, in float64.

Both start from the same parameters, which are read from the script's model before its first update, and get the same
data, which that program reads or draws for itself. Every loss, the scores at the end and the trained parameters must
agree. A test of its own holds the distributions that the parameters start from.
"""

import contextlib
import csv
import dataclasses
import json
import math
from types import SimpleNamespace

import formulas
import numpy as np
import pytest
import scipy.stats
import torch
from conftest import module_of, write_mnist
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

RELATIVE = 1e-9
LOGGED = 1e-6                                                       # log.csv holds seven digits
IMAGES, PIXELS = 153, 20                                            # of each part of MNIST; of each image

# What all cases of a task share; a case that types a value again wins.
COMMON = {
    "copytask": "--nhid 12 --T 9 --labels 5 --c-length 3 --batch 7 --updates 60",
    "sMNIST": "--nhid 12 --batch 5 --epochs 2 --permute",
    "language": "--nhid 12 --emsize 6 --bptt 13 --batch 4 --epochs 4",
}

# Every task × cell; each stair, optimizer and start, clipping, and the options of a task are met at least once. An α_t
# that starts at 0.02 comes to its bound, 0; all characters but nnRNN halve their rates. Rates are such that rounding
# errors grow little: no loss of the two programs differs by more than 1e-11.
CASES = [
    "copytask_nvar     --net-type RNN --nvar expn --rinit xavier --lr 2e-3 --alpha 0.9",
    "copytask_nvar     --net-type RNN --nvar none --rinit henaff --lr 1e-3 --alpha 0.9 --no-onehot --clip 0.3",
    "copytask_alpha    --net-type RNN-Orth --rinit random --lr 2e-3 --optimizer Adam --vari",
    "copytask_expalpha --net-type expRNN --rinit henaff --lr 2e-3 --lr_orth 1e-3 --alpha 0.99 --alpha-start 0.02",
    "copytask_nvar     --net-type expRNN --nvar logn --rinit skew --lr 2e-3 --lr_orth 1e-3 --optimizer Adam",
    "copytask_nvar     --net-type nnRNN --nvar n2 --rinit henaff --lr 2e-3 --lr_orth 1e-4 --alpha 0.99 --alam 0.1 "
    "--Tdecay 0.3 --clip 0.05",
    "copytask_nvar     --net-type LSTM --nvar none --rinit xavier --lr 5e-3 --alpha 0.99",
    "sMNIST_nvar       --net-type RNN --nvar log2n --rinit xavier --lr 1e-3 --alpha 0.9 --no-permute",
    "sMNIST_expalpha   --net-type RNN-Orth --rinit henaff --lr 1e-3 --optimizer Adam --betas 0.5 0.9",
    "sMNIST_alpha      --net-type expRNN --rinit cayley --lr 2e-3 --lr_orth 5e-4 --alpha 0.99",
    "sMNIST_nvar       --net-type nnRNN --nvar expn --rinit cayley --lr 1e-3 --lr_orth 1e-4 --optimizer Adam "
    "--alam 0.1 --Tdecay 0.1",
    "sMNIST_nvar       --net-type LSTM --nvar none --rinit random --lr 5e-3 --optimizer Adam --clip 0.5",
    "language_alpha    --net-type RNN --rinit xavier --lr 5e-3 --alpha 0.9 --tied --emsize 12",
    "language_nvar     --net-type RNN-Orth --nvar sqrtlogn --rinit skew --lr 1e-2 --optimizer Adam",
    "language_nvar     --net-type expRNN --nvar n --rinit cayley --lr 1e-2 --lr_orth 5e-3 --alpha 0.9 --clip 0.2",
    "language_expalpha --net-type nnRNN --rinit random --lr 1e-3 --lr_orth 5e-4 --optimizer Adam --alam 1 "
    "--Tdecay 1e-4",
    "language_nvar     --net-type LSTM --nvar none --rinit xavier --lr 2e-2 --alpha 0.9",
]

LETTERS = {                                                         # the last part of a parameter's name
    "input_weight": "U", "input_bias": "bias", "recurrent_weight": "W", "logarithm": "A", "upper": "T",
    "gamma": "gamma", "theta": "theta", "numbers": "alpha", "nonlinearity.bias": "b", "readout.weight": "V",
    "readout.bias": "c", "embedding": "E", "decoder": "V", "decoder_bias": "c", "weight_ih_l0": "Wx",
    "weight_hh_l0": "Wh", "bias_ih_l0": "b"}


def options_of(command: str) -> tuple[str, list, dict]:
    """A case → its script, all that is typed, and the value of every option that the program of the formulas knows."""
    script, *typed = command.split()
    task, stair = script.split("_")
    typed = COMMON[task].split() + typed
    o = dict(stair=stair, optimizer="RMSprop", betas=(0.0, 0.9) if task == "language" else (0.9, 0.999), clip=0.0,
             alam=0.0, Tdecay=0.0, onehot=True, vari=False, permute=False, random_seed=400)
    for flag in " ".join(typed).split("--")[1:]:
        name, *values = flag.split()
        name, values = name.replace("-", "_"), [number_or_text(value) for value in values]
        if not values:
            o[name.removeprefix("no_")] = not name.startswith("no_")
        else:
            o[name] = values[0] if len(values) == 1 else tuple(values)
    return script, typed, o


def number_or_text(text: str):
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def by_letter(parameters: dict) -> dict:
    """Parameters by the script's names → by the letters of the program of the formulas, triangles as matrices."""
    found = {}
    for name, value in parameters.items():
        if name.endswith("bias_hh_l0"):                             # the second bias of torch's LSTM, which is not used
            assert not value.any()
            continue
        letter = next(letter for end, letter in LETTERS.items() if f".{name}".endswith(f".{end}"))
        if letter in ("A", "T"):
            size = round((1 + math.sqrt(1 + 8 * len(value))) / 2)
            matrix = torch.zeros(size, size)
            matrix[np.triu_indices(size, 1)] = value
            value = matrix
        found[letter] = value
    return found


def text(seed: int, symbols: int, backwards: bool = False) -> str:
    """Lines of words. Read backwards, their statistics are others, so what learns them forgets to predict these."""
    words = ["t h e", "c a t", "s a t", "o n", "m a t"]
    random = np.random.default_rng(seed)
    lines, written = [], 0
    while written < symbols:
        line = " _ ".join(words[k] for k in random.integers(0, len(words), 6))
        lines.append(line[::-1] if backwards else line)
        written += len(line.split()) + 1
    return "".join(f" {line} \n" for line in lines)


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    return write_mnist(tmp_path_factory.mktemp("images"), 6 * IMAGES, IMAGES)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    (folder / "pennchar").mkdir()
    for seed, (part, symbols) in enumerate((("train", 770), ("valid", 200), ("test", 200))):
        (folder / "pennchar" / f"{part}.txt").write_text(text(seed, symbols, backwards=part != "train"))
    return folder


class Enough(Exception):
    """Raised where a run has shown all that a test wants of it."""


@pytest.fixture
def run(monkeypatch, tmp_path, image_folder, text_folder):
    """run(script, *typed) → start: parameters before the first update; objectives: what each update went down; folder.

    With `only_start` the run ends before its first update.
    """
    def go(script, *typed, only_start=False):
        module, seen = module_of(script), SimpleNamespace(start=None, objectives=[], objective=None)
        whole = getattr(module, "load_mnist", None)

        def before_forward(model, _):
            if seen.start is None:                                  # the first module to be called is the whole model
                seen.start = {name: p.detach().clone() for name, p in model.named_parameters()}
                if only_start:
                    raise Enough

        def backward(objective, *given, whole=torch.Tensor.backward, **named):
            seen.objective = objective.item()
            return whole(objective, *given, **named)

        def before_step(*_):
            seen.objectives.append(seen.objective)

        def first_pixels(*given):
            return tuple(dataclasses.replace(part, pixels=part.pixels[:IMAGES, :PIXELS], labels=part.labels[:IMAGES])
                         for part in whole(*given))

        data = {"sMNIST": ["--data", image_folder], "language": ["--data", text_folder], "copytask": []}
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with monkeypatch.context() as patch, contextlib.suppress(Enough):
            patch.setattr(torch.Tensor, "backward", backward)
            patch.setattr(module, "load_mnist", first_pixels, raising=False)
            hooks = (register_module_forward_pre_hook(before_forward),
                     register_optimizer_step_pre_hook(before_step))
            try:
                module.main([*typed, *data[script.split("_")[0]], "--log-interval", "1", "--threads", "1",
                             "--save", folder])
            finally:
                for hook in hooks:
                    hook.remove()
        seen.folder, = (folder / script).iterdir()
        return seen
    return go


def by_the_formulas(task: str, program: formulas.Program, image_folder, text_folder) -> dict:
    """Train the program of the formulas on its own reading of the same data → its scores."""
    if task == "copytask":
        return formulas.copying(program)
    if task == "sMNIST":
        return formulas.pixels(program, *formulas.pixel_sequences(image_folder, program.o["permute"], IMAGES, PIXELS))
    return formulas.characters(program, *formulas.read_characters(text_folder))


def short(command: str) -> str:
    """The script and the cell of a command."""
    return " ".join(command.split()[:3:2])


@pytest.mark.parametrize("case", CASES, ids=short)
def test_a_script_trains_as_the_formulas_say(float64, run, image_folder, text_folder, case):
    script, typed, options = options_of(case)
    task = script.split("_")[0]
    seen = run(script, *typed)
    program = formulas.Program(options, by_letter(seen.start))
    scores = by_the_formulas(task, program, image_folder, text_folder)

    assert len(program.losses) >= 50
    assert max(program.losses) < 10                                 # beyond that rounding errors grow without a bound
    assert seen.objectives == pytest.approx(program.objectives, rel=RELATIVE, abs=0)

    with open(seen.folder / "log.csv", newline="", encoding="utf-8") as file:
        log = list(csv.DictReader(file))
    logged = [float(row["loss" if task == "copytask" else "train_loss"]) for row in log]
    assert logged == pytest.approx(program.losses, rel=LOGGED, abs=0)
    for name in scores.keys() & log[0].keys() - {"loss", "recall"}:  # once an epoch
        found = [float(row[name]) for row in log if row["validation_loss"]]
        assert found == pytest.approx(scores.pop(name), rel=LOGGED, abs=0), name

    result = json.loads((seen.folder / "result.json").read_text(encoding="utf-8"))
    for name, score in scores.items():                              # a share of hits may be a float32
        assert result[name] == pytest.approx(score, rel=RELATIVE if "loss" in name else LOGGED, abs=0), name

    saved = torch.load(seen.folder / "last.pt", weights_only=True)["parts"]["model"]
    found = by_letter(saved)
    for letter, value in program.copy().items():
        assert (found[letter] - value).abs().max() <= RELATIVE * value.abs().max(), letter


H = 100                                                             # hidden units


def normal(variance: float):
    return scipy.stats.norm(0, math.sqrt(variance))


def uniform(low: float, high: float):
    return scipy.stats.uniform(low, high - low)


# A number stands for a constant. The read-outs start as in the public repositories: Glorot normal with the bias of
# torch.nn.Linear, torch.nn.Linear's default, U(−0.1, 0.1) with bias 0.
STARTS = [
    ("copytask_alpha --net-type RNN --rinit xavier --nhid 100 --labels 8",
     {"V": normal(2 / (H + 9)), "c": uniform(-1 / math.sqrt(H), 1 / math.sqrt(H)), "U": normal(2 / (10 + H)),
      "W": normal(1 / H), "b": uniform(-0.01, 0.01), "alpha": 1.0}),
    ("sMNIST_expalpha --net-type nnRNN --nhid 100",
     {"V": uniform(-1 / math.sqrt(H), 1 / math.sqrt(H)), "c": uniform(-1 / math.sqrt(H), 1 / math.sqrt(H)),
      "U": uniform(-1, 1), "gamma": 1.0, "theta": uniform(0, 2 * math.pi), "T": 0.0, "alpha": 20.0}),
    ("language_alpha --net-type expRNN --nhid 100 --emsize 40",
     {"V": uniform(-0.1, 0.1), "c": 0.0, "E": uniform(-0.1, 0.1), "U": normal(2 / 40), "alpha": 0.98}),
]


@pytest.mark.parametrize(("command", "expected"), STARTS, ids=("copying", "pixels", "characters"))
def test_parameters_start_from_their_distributions(float64, run, command, expected):
    script, typed, _ = options_of(command)
    drawn = [by_letter(run(script, *typed, "--seed", seed, only_start=True).start) for seed in range(4)]
    for letter, distribution in expected.items():
        values = torch.stack([start[letter] for start in drawn]).flatten()
        if isinstance(distribution, float):
            assert (values == distribution).all(), letter
        else:                                                       # Kolmogorov and Smirnov; the seeds are fixed
            assert len(values.unique()) == len(values), letter
            assert scipy.stats.kstest(values.numpy(), distribution.cdf).pvalue > 1e-3, letter
