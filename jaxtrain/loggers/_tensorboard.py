"""tensorboard: event files that TensorBoard shows."""

from __future__ import annotations

import os
import socket
import struct
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from jaxtrain._extras import needs_extra
from jaxtrain.loggers._histograms import histograms as histograms_of
from jaxtrain.loggers._logger import Logger, Writer, checked_folder, learning_rate, open_logger
from jaxtrain.training.events import EpochDone, StepsDone

# TensorBoard reads files whose names contain "tfevents"; this suffix marks ours.
EVENT_FILES = "events.out.tfevents.*.jaxtrain"
# Of a PNG file: after the signature and a header of 8 bytes, the width and the height.
_PNG_SIZE = slice(16, 24)
_RGBA = 4


def tensorboard(
    folder: str | os.PathLike[str], *, histograms: bool = False
) -> AbstractContextManager[Logger]:
    """Writes event files for TensorBoard; `tensorboard --logdir FOLDER` shows them.

    The scalars are `step_loss` for every step, `learning_rate` at each report if the optimizer
    records it, and the columns of the history for every epoch, all at the number of steps of all
    epochs so far.

    Args:
      folder: where to write; made if it is missing. A run that resumes hides what was written after
        the step where it resumes; a run that starts at step 0 removes the event files of an earlier
        run by this logger, and no others.
      histograms: also write a histogram of every array of the parameters after each epoch, with the
        names of `save_params`.

    Returns:
      A context manager; its value is the function to pass as `on_event`. Its method `picture` adds
      pictures.

    Raises:
      MissingExtraError: `jaxtrain[tensorboard]` is not installed.
      InputError: the folder cannot be made or written.

    Example:
      >>> with jt.loggers.tensorboard("runs/a/tensorboard", histograms=True) as log:
      ...     state, history = jt.fit(state, train, loss_fn=loss_fn, on_event=log)
    """
    with needs_extra("tensorboard"):
        import tensorboardX.record_writer  # noqa: F401
    path = checked_folder(folder, "folder")
    return open_logger("TensorBoard", path, _TensorBoard(path, histograms))


class _TensorBoard(Writer):
    """Writes records itself: tensorboardX's writer has a thread, which hides a full disk.

    Its queue then fills, and the run hangs.
    """

    takes_pictures = True

    def __init__(self, folder: Path, histograms: bool) -> None:
        self._folder = folder
        self._histograms = histograms
        self._file: BinaryIO | None = None

    def start(self, step: int) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog

        if step == 0:
            for earlier in self._folder.glob(EVENT_FILES):
                earlier.unlink(missing_ok=True)
        self.start_without_run()
        # TensorBoard drops what other files have from this step on.
        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def start_without_run(self) -> None:
        self.close()
        self._folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files in the order of their names.
        name = EVENT_FILES.replace("*", f"{time.time():.6f}.{socket.gethostname()}.{os.getpid()}")
        self._file = (self._folder / name).open("xb")
        self._write(file_version="brain.Event:2")

    def steps(self, event: StepsDone, first: int) -> None:
        for step, loss in enumerate(event.losses.tolist(), first):
            self._write_values(step, {"step_loss": loss})
        rate = learning_rate(event.state)
        if rate is not None:
            self._write_values(first + len(event.losses) - 1, {"learning_rate": rate})
        self._flush()

    def epoch(self, event: EpochDone, step: int) -> None:
        from tensorboardX.summary import histogram_raw

        # The rate is that of the epoch's last step, which `steps` has written.
        rows = {name: value for name, value in event.metrics.items() if name != "learning_rate"}
        self._write_values(step, rows)
        for name, values, counts, edges in histograms_of(event.state) if self._histograms else ():
            summary = histogram_raw(
                name,
                min=values.min(),
                max=values.max(),
                num=len(values),
                sum=values.sum(),
                sum_squares=(values**2).sum(),
                bucket_limits=edges.tolist(),  # upper limits: the first bucket is empty
                bucket_counts=[0, *counts.tolist()],
            )
            self._write(step=step, summary=summary)
        self._flush()

    def picture(self, name: str, png: bytes, step: int) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        width, height = struct.unpack(">II", png[_PNG_SIZE])
        image = Summary.Image(
            width=width, height=height, colorspace=_RGBA, encoded_image_string=png
        )
        self._write(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))
        self._flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _write_values(self, step: int, values: dict[str, float]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        entries = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=Summary(value=entries))

    def _write(self, **fields: Any) -> None:
        """Appends an event as a record: its length and its content, each with a checksum."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        content = Event(wall_time=time.time(), **fields).SerializeToString()
        length = struct.pack("<Q", len(content))
        checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
        assert self._file is not None
        self._file.write(length + checksums[0] + content + checksums[1])

    def _flush(self) -> None:
        assert self._file is not None
        self._file.flush()
