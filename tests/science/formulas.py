"""Training written down as the papers' formulas say it: slow, and without a line of `common`.

One Python loop over time; W by scipy.linalg.expm, its gradient pulled back by scipy.linalg.expm_frechet; torch's own
RMSprop or Adam, one for each rate. The three tasks read or draw their data here. A parameter has the formulas' letter:

    U (I, H), bias (H,), W (H, H)       input map and free recurrent matrix        z_t = x_t U + bias + h_{t-1} W
    A (H, H), T (H, H), gamma, theta    W = exp(A − Aᵀ) or P (Λ + T) Pᵀ; only the strict upper triangles of A, T count
    b (H,), alpha (T,)                  modReLU and a learned stair
    V (C, H), c (C,)                    read-out
    E (V, E)                            embedding; where V is missing, E is the read-out too (tied)
    Wx, Wh, b                           LSTM, gates in the order input, forget, cell, output
"""

import math

import numpy as np
import scipy.linalg
import torch
from torch.nn.functional import cross_entropy, one_hot

SCHEDULES = {
    "none": lambda t: 1.0,
    "n": lambda t: 1 - 1 / (t + 2),
    "n2": lambda t: 1 - 1 / (t + 2) ** 2,
    "expn": lambda t: 1 - math.exp(-(t + 2)),
    "logn": lambda t: 1 - 1 / math.log(t + 2),
    "log2n": lambda t: 1 - 1 / math.log(2 * (t + 4)),
    "sqrtlogn": lambda t: 1 - 1 / math.sqrt(math.log(t + 3)),
}


class Exponential(torch.autograd.Function):
    """exp(S); backward is the adjoint of the Fréchet derivative of exp at S, which is the derivative at Sᵀ."""

    @staticmethod
    def forward(ctx, s):
        ctx.save_for_backward(s)
        return torch.from_numpy(scipy.linalg.expm(s.detach().numpy()))

    @staticmethod
    def backward(ctx, gradient):
        s, = ctx.saved_tensors
        return torch.from_numpy(scipy.linalg.expm_frechet(s.numpy().T, gradient.numpy(), compute_expm=False))


class Program:
    """`options` as typed, `p` the parameters by their letters; every update leaves its loss and its objective."""

    def __init__(self, options: dict, start: dict):
        self.o = options
        self.p = {letter: value.clone().requires_grad_() for letter, value in start.items()}
        self.losses, self.objectives = [], []                       # objective: loss + alam Σ (γ − 1)²
        free = [value for letter, value in self.p.items() if letter not in ("A", "T")]
        self.optimizers = [self.optimizer(free, options["lr"])]
        if "A" in self.p:
            self.optimizers.append(self.optimizer([self.p["A"]], options["lr_orth"]))
        if "T" in self.p:
            self.optimizers.append(self.optimizer([self.p["T"]], options["lr"], options["Tdecay"]))

    def optimizer(self, parameters, lr, decay=0.0):
        if self.o["optimizer"] == "Adam":
            return torch.optim.Adam(parameters, lr, betas=self.o["betas"], weight_decay=decay)
        return torch.optim.RMSprop(parameters, lr, alpha=self.o["alpha"], weight_decay=decay)

    # ── the network ──

    def recurrent_matrix(self):
        p = self.p
        if "W" in p:
            return p["W"]
        a = p["A"].triu(1)
        rotation = Exponential.apply(a - a.t())
        if "gamma" not in p:
            return rotation
        blocks = [gamma * torch.stack([torch.stack([theta.cos(), -theta.sin()]),
                                       torch.stack([theta.sin(), theta.cos()])])
                  for gamma, theta in zip(p["gamma"], p["theta"], strict=True)]
        return rotation @ (torch.block_diag(*blocks) + p["T"].triu(1)) @ rotation.t()

    def activation(self, t, z):
        phi = torch.sign(z) * torch.relu(torch.abs(z) + self.p["b"])
        if "alpha" not in self.p:
            return SCHEDULES[self.o["nvar"]](t) * phi
        alpha = self.p["alpha"][t]
        return (1 - torch.exp(-alpha * torch.abs(z))) * phi if self.o["stair"] == "expalpha" else alpha * phi

    def run(self, xs, state=None):
        """xs: T inputs (B, I) → T hidden states (B, H) and the state after the last, (h,) or (h, c)."""
        p, hs = self.p, []
        if "Wh" in p:
            h, c = state or [torch.zeros(len(xs[0]), p["Wh"].shape[1])] * 2
            for x in xs:
                i, f, g, o = (x @ p["Wx"].t() + h @ p["Wh"].t() + p["b"]).chunk(4, dim=1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.sigmoid(o) * torch.tanh(c)
                hs.append(h)
            return hs, (h, c)
        w = self.recurrent_matrix()
        h, = state or [torch.zeros(len(xs[0]), len(w))]
        for t, x in enumerate(xs):
            z = x @ p["U"] + h @ w + p.get("bias", 0)
            h = self.activation(t, z)
            hs.append(h)
        return hs, (h,)

    def read_out(self, h):
        return h @ self.p.get("V", self.p.get("E")).t() + self.p["c"]

    # ── an update ──

    def learn(self, loss):
        objective = loss
        if "gamma" in self.p:
            objective = loss + self.o["alam"] * sum((gamma - 1) ** 2 for gamma in self.p["gamma"])
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        objective.backward()
        if self.o["clip"]:
            gradients = [value.grad for value in self.p.values() if value.grad is not None]
            norm = math.sqrt(sum((gradient ** 2).sum().item() for gradient in gradients))
            for gradient in gradients:
                gradient *= min(1.0, self.o["clip"] / (norm + 1e-6))
        for optimizer in self.optimizers:
            optimizer.step()
        if self.o["stair"] == "expalpha":
            self.p["alpha"].data.clamp_(min=0)
        self.losses.append(loss.item())
        self.objectives.append(objective.item())

    def copy(self):
        return {letter: value.detach().clone() for letter, value in self.p.items()}


def copying(program: Program) -> dict:
    """Train on fresh batches → mean loss and recall of the last 50 updates."""
    o, recalls = program.o, []
    c, marker = o["c_length"], o["labels"] + 1
    generator = torch.Generator().manual_seed(o["random_seed"])
    for _ in range(o["updates"]):
        delay = int(torch.randint(1, o["T"] + 1, (), generator=generator)) if o["vari"] else o["T"]
        symbols = list(torch.randint(1, o["labels"] + 1, (c, o["batch"]), generator=generator))
        blank = torch.zeros(o["batch"], dtype=torch.int64)
        inputs = [*symbols, *[blank] * (delay - 1), blank + marker, *[blank] * c]
        targets = [*[blank] * (delay + c), *symbols]
        if o["onehot"]:
            xs = [one_hot(x, marker + 1).double() for x in inputs]
        else:
            xs = [x.double().unsqueeze(1) for x in inputs]
        logits = [program.read_out(h) for h in program.run(xs)[0]]
        terms = [cross_entropy(y, target, reduction="sum") for y, target in zip(logits, targets, strict=True)]
        program.learn(sum(terms) / (len(terms) * o["batch"]))
        right = [(y.argmax(1) == target).sum().item()
                 for y, target in zip(logits[-c:], targets[-c:], strict=True)]
        recalls.append(sum(right) / (c * o["batch"]))
    return {"loss": sum(program.losses[-50:]) / 50, "recall": sum(recalls[-50:]) / 50}


def read_images(raw, part):
    """The idx files of a part → pixels (N, 784) and labels (N,)."""
    pixels = np.frombuffer((raw / f"{part}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16).reshape(-1, 784)
    labels = np.frombuffer((raw / f"{part}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
    return pixels, labels


def pixel_sequences(folder, permute, count, steps):
    """(pixels (count, steps), labels) of the first images of train, validation and test, the first pixels of each."""
    raw = folder / "MNIST" / "raw"
    (pixels, labels), (test_pixels, test_labels) = read_images(raw, "train"), read_images(raw, "t10k")
    random, end = np.random.RandomState(1234), len(labels) * 5 // 6             # of MNIST 50,000
    order, split = random.permutation(784), random.permutation(len(labels))
    order = order[:steps] if permute else range(steps)
    train, valid = split[:count], split[end:end + count]
    parts = [(pixels[train], labels[train]), (pixels[valid], labels[valid]), (test_pixels[:count], test_labels[:count])]
    return [(images[:, order], torch.tensor(digits.astype(int))) for images, digits in parts]


def pixels(program: Program, train, valid, test) -> dict:
    """Train for some epochs → the validation loss of each, and the test loss of the one with most hits in it."""
    o, best = program.o, (-1, None)
    validation = []

    def logits(images, first):
        batch = images[first:first + o["batch"]]
        xs = [torch.tensor(batch[:, t] / 255).unsqueeze(1) for t in range(batch.shape[1])]
        return program.read_out(program.run(xs)[0][-1])

    @torch.no_grad()
    def evaluate(images, labels):
        y = torch.cat([logits(images, first) for first in range(0, len(labels), o["batch"])])
        return cross_entropy(y, labels).item(), (y.argmax(1) == labels).sum().item()

    for _ in range(o["epochs"]):
        images, labels = train
        for first in range(0, len(labels), o["batch"]):
            program.learn(cross_entropy(logits(images, first), labels[first:first + o["batch"]]))
        loss, hits = evaluate(*valid)
        validation.append(loss)
        if hits > best[0]:
            best = (hits, program.copy())
    last, program.p = program.p, best[1]
    test_loss, hits = evaluate(*test)
    program.p = last
    return {"validation_loss": validation, "test_loss": test_loss, "test_accuracy": hits / len(test[1])}


def read_characters(folder):
    """Three lists of numbers: symbols counted in the order in which the training text brings them."""
    texts, number = [], {}
    for part in ("train", "valid", "test"):
        symbols = []
        for line in (folder / "pennchar" / f"{part}.txt").read_text().splitlines():
            symbols += [*line.split(), "<eos>"]
        for symbol in symbols:
            if symbol not in number:
                assert part == "train"
                number[symbol] = len(number)
        texts.append([number[symbol] for symbol in symbols])
    return texts


def characters(program: Program, train, valid, test) -> dict:
    """Train for some epochs → the validation loss and the rate of each, and the test loss of the best one."""
    o, best = program.o, (math.inf, None)
    validation, rates = [], []

    def segments(text, streams):
        """(inputs, targets), both lists of steps (streams,), one pair a segment of at most bptt steps."""
        length = len(text) // streams
        steps = [torch.tensor([text[k * length + t] for k in range(streams)]) for t in range(length)]
        for first in range(0, length - 1, o["bptt"]):
            last = min(first + o["bptt"], length - 1)
            yield steps[first:last], steps[first + 1:last + 1]

    def mean_loss(inputs, targets, state):
        hs, state = program.run([program.p["E"][symbols] for symbols in inputs], state)
        terms = [cross_entropy(program.read_out(h), target) for h, target in zip(hs, targets, strict=True)]
        return sum(terms) / len(terms), tuple(part.detach() for part in state)

    @torch.no_grad()
    def evaluate(text):
        state, total, steps = None, 0.0, 0
        for inputs, targets in segments(text, 10):
            loss, state = mean_loss(inputs, targets, state)
            total, steps = total + loss.item() * len(inputs), steps + len(inputs)
        return total / steps

    for _ in range(o["epochs"]):
        state = None
        for inputs, targets in segments(train, o["batch"]):
            loss, state = mean_loss(inputs, targets, state)
            program.learn(loss)
        rates.append(program.optimizers[0].param_groups[0]["lr"])
        validation.append(evaluate(valid))
        if validation[-1] < best[0]:
            best = (validation[-1], program.copy())
        else:
            for optimizer in program.optimizers:
                optimizer.param_groups[0]["lr"] /= 2
    last, program.p = program.p, best[1]
    test_loss = evaluate(test)
    program.p = last
    return {"validation_loss": validation, "lr": rates, "test_loss": test_loss}
