"""--tensorboard: the rows of log.csv and the options as events that TensorBoard reads, in the run's folder."""

from pathlib import Path

from common.runs.records import log_rows


class Events:
    """What TensorBoard reads of the run in `folder`, from the rows that log.csv has by now.

    Earlier events go: a run that goes on has cut its log.

    epoch   updates of an epoch, None where there are none
    """

    def __init__(self, folder: Path, options: str, epoch: int | None):
        from torch.utils.tensorboard import SummaryWriter  # here: most runs need no such package

        for earlier in folder.glob("events.out.tfevents.*"):
            earlier.unlink()
        self.writer, self.epoch = SummaryWriter(folder), epoch
        self.writer.add_text("options", options.replace("\n", "  \n"))
        for row in log_rows(folder):
            self.add(row)

    def add(self, row: dict) -> None:
        """A row of the log, at the number of its update."""
        step = row["update"] if self.epoch is None else (row["epoch"] - 1) * self.epoch + row["batch"]
        for name, value in row.items():
            if value is not None:
                self.writer.add_scalar(name, value, int(step))
        self.writer.flush()
