"""What a training loop counts: its place, its means since the last report, and its last values one by one.

A checkpoint holds the `Progress` of a loop, so that a resumed run goes on where it stood.
"""

import torch


class Progress:
    """Where a loop stands: numbers and tensors as attributes, all of them saved in a checkpoint."""

    def __init__(self, **start):
        vars(self).update(start)

    def state_dict(self) -> dict:
        return {name: value.values if isinstance(value, Recent) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: dict) -> None:
        """Raises ValueError for the state of another loop."""
        if vars(self).keys() != state.keys():
            raise ValueError(f"it counts {', '.join(state)}, and this loop {', '.join(vars(self))}")
        for name, new in state.items():
            kept = getattr(self, name)
            if isinstance(kept, Recent):
                kept.values[:len(new)] = new   # of a run of fewer updates: it kept fewer values and overwrote none
            elif torch.is_tensor(kept):
                kept.copy_(new)                # in place: a meter shares it
            else:
                setattr(self, name, new)


class Meter:
    """Means over the examples since the last report. The sums stay on the device, so no update waits for a number."""

    def __init__(self, *names: str, device):
        self.names, self.sums = names, torch.zeros(len(names) + 1, device=device)  # the last: how many examples

    @torch.no_grad()
    def add(self, *sums: torch.Tensor, count: int) -> None:
        """Of one batch: a sum over its `count` examples for each name."""
        self.sums += torch.stack((*sums, torch.full_like(sums[0], count)))

    def pop_means(self) -> dict[str, float]:
        """{name: mean since the last call}."""
        *sums, count = self.sums.tolist()
        self.sums.zero_()
        return {name: total / count for name, total in zip(self.names, sums, strict=True)}


class Recent:
    """The values of the last `keep` updates, one by one and on the device: for medians, and for a mean at the end."""

    def __init__(self, *names: str, keep: int, device):
        self.values = torch.zeros(keep, len(names), device=device)

    @torch.no_grad()
    def add(self, update: int, *values: torch.Tensor) -> None:
        """The values of update 1, 2, …; they take the place of those `keep` updates before."""
        self.values[(update - 1) % self.values.shape[0]] = torch.stack(values)

    def rows(self, update: int, last: int) -> torch.Tensor:
        """The values of the `last` updates up to `update` → (last, names)."""
        return self.values[torch.arange(update - last, update) % len(self.values)]
