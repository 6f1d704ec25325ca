"""`record`: a training run that writes down what each of its steps really took."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from chunkft_compile.capture import unwrapped
from chunkft_compile.errors import TrainingError
from chunkft_compile.module import ChunkedModule
from chunkft_compile.run_writer import Recording


@contextmanager
def record(model: nn.Module, path: str | Path) -> Iterator[Recording]:
    """While the block runs, what each optimizer step of a compiled model takes is written to `path`, a line of JSON for each.

        with chunkft_compile.record(model, "run.jsonl") as recording:
            for batch in loader:
                loss = model(**batch).loss
                loss.backward()
                recording.note_loss(loss.item())  # if the file is to have it
                optimizer.step()
                optimizer.zero_grad()

    A line has the time and the peak of every instruction, and the traffic to the stores; lines between say which plan the steps ran
    under (`chunkft_compile.run_lines` describes them all). `chunkft_compile.reports.runs` reads the file, and compares it with the plan
    that `model.save_schedule("plan.json")` writes. Training changes by no bit. A line is written as soon as its step is complete; on an
    accelerator when the device has done it, which nobody waits for before the end of the block.

    Peaks are what the gauge of the promise reads: on a CPU exact, where the allocator hook could be built. The one peak statistic of an
    accelerator is not reset, so there they are lower bounds, exact with `CHUNKFT_DEBUG=2`. Where there is no gauge, the header says why.

    A model under `torch.compile(model, backend="chunkft")` is `chunkft_compile.dynamo.chunked_of(model)` here. When the file cannot be
    written any more, the recording ends with a warning, not the training. Raises `FileExistsError` where there is a file already,
    `TypeError` for a model that is not compiled, and `TrainingError` for one that is being recorded.
    """
    found = unwrapped(model)
    if not isinstance(found, ChunkedModule):
        raise TypeError(
            f"record wants a model that chunkft_compile.compile returned, not a {type(model).__name__}; for one under "
            f'torch.compile(backend="chunkft") pass chunkft_compile.dynamo.chunked_of(model)'
        )
    session = found._session
    if session.recording is not None:
        raise TrainingError("this model is being recorded already; leave that block first")
    try:
        file = Path(path).open("xb", buffering=0)  # noqa: SIM115 (closed below, and its error is not that of the block)
    except FileExistsError as error:
        raise FileExistsError(f"{path} is there already, and may be another run; name another file, or remove it") from error
    with file:
        recording = Recording(file, session.device, session.options.budget_nbytes, session.guard, session.stores.traffic)
        session.recording = recording
        try:
            yield recording
        finally:
            session.recording = None
            recording.finish()
