"""tensorboard: event files that TensorBoard shows."""

from __future__ import annotations

import os
import socket
import struct
import time
import weakref
from typing import Any

import numpy as np

from jaxtrain._extras import needs_extra
from jaxtrain.callbacks._board import BoardLogger, checked_folder

# TensorBoard reads files whose names contain "tfevents"; this suffix marks ours.
EVENT_FILES = "events.out.tfevents.*.jaxtrain"
# Of a PNG file: after the signature and a header of 8 bytes, the width and the height.
_PNG_SIZE = slice(16, 24)


def tensorboard(folder: str | os.PathLike[str], *, histograms: bool = False) -> BoardLogger:
    """Writes event files for TensorBoard; `tensorboard --logdir FOLDER` shows them.

    The scalars are `step_loss` for every step, `learning_rate` at each report if the optimizer
    records it, and the columns of the history for every epoch, all at the number of steps of all
    epochs so far. An array of up to 100 values, such as one per class, becomes `NAME/0`, `NAME/1`
    and so on; other arrays are left out. With several processes, only process 0 writes.

    Args:
      folder: where to write; made if it is missing. A run that resumes hides what was written after
        the step where it resumes; a run that starts at step 0 removes the event files of an earlier
        run by this logger, and no others.
      histograms: also write a histogram of every array of the parameters after each epoch, with the
        names of `jt.save`.

    Returns:
      A callback for `fit`, whose method `picture` adds pictures, also after the training. If it
      cannot write, it warns once, and training continues.

    Raises:
      MissingExtraError: `jaxtrain[tensorboard]` is not installed.
      InputError: the folder cannot be made or written.

    Example:
      >>> from matplotlib.figure import Figure
      >>> figure = Figure()
      >>> log = jt.callbacks.tensorboard("runs/a/tensorboard", histograms=True)
      >>> state, history = jt.fit(state, train, loss_fn=loss_fn, callbacks=[log])
      >>> lines = figure.subplots().plot(history["train_loss"])
      >>> log.picture("training loss", figure)
    """
    with needs_extra("tensorboard"):
        import tensorboardX.record_writer  # noqa: F401
    return _TensorBoard("TensorBoard", checked_folder(folder), histograms)


class _TensorBoard(BoardLogger):
    """Writes by tensorboardX's RecordWriter, which raises an error if the disk is full.

    In its SummaryWriter, a thread writes: it would print the error, and the run would hang. The
    file stays open after a run, for pictures.
    """

    _writer: Any = None

    def _start(self, step: int) -> None:
        from tensorboardX.proto.event_pb2 import SessionLog

        if step == 0:
            if self._step is not None:  # otherwise the file contains only pictures
                self._finish()
            for path in self._place.glob(EVENT_FILES):
                if self._writer is None or str(path) != self._writer.path:
                    path.unlink(missing_ok=True)
        # TensorBoard drops earlier records from this step on.
        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def _scalars(self, step: int, values: dict[str, Any]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        entries = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=Summary(value=entries))

    def _histogram(
        self, step: int, name: str, values: np.ndarray, counts: np.ndarray, edges: np.ndarray
    ) -> None:
        from tensorboardX.summary import histogram_raw

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

    def _image(self, step: int, name: str, png: bytes) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        width, height = struct.unpack(">II", png[_PNG_SIZE])
        image = Summary.Image(width=width, height=height, encoded_image_string=png)
        self._write(step=step, summary=Summary(value=[Summary.Value(tag=name, image=image)]))

    def _close(self, error: BaseException | None) -> None:
        if error is not None:
            self._finish()
        else:
            self._flush()

    def _flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def _finish(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _write(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        event = Event(wall_time=time.time(), **fields)
        self._opened().write(event.SerializeToString())

    def _opened(self) -> Any:
        """Returns the writer of the event file; a new file starts with its version."""
        if self._writer is None:
            from tensorboardX.record_writer import RecordWriter

            self._place.mkdir(parents=True, exist_ok=True)
            # TensorBoard reads the files in the order of their names.
            unique = f"{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
            self._writer = RecordWriter(str(self._place / EVENT_FILES.replace("*", unique)))
            weakref.finalize(self, self._writer.close)
            self._write(file_version="brain.Event:2")
        return self._writer
