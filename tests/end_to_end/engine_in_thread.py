"""A whole engine in a thread instead of processes: the real loop, socket and model, its books open to a test."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from configs.engine import EngineConfig
from configs.errors import EngineDeadError, NanoEngineError
from nanoengine.engine import EngineCore
from nanoengine.engine_status import EngineCondition, ReportedStatus
from nanoengine.executor import create_executor
from nanoengine.front_socket import FrontSocket
from nanoengine.step import Epoch


class EngineInThread(ReportedStatus):
    """Stands for `SchedulerKeeper`; `core` is what runs."""

    def __init__(self, config: EngineConfig, run_dir: Path) -> None:
        super().__init__()
        self._run_dir = run_dir
        self._executor = create_executor(config, run_dir)
        self.address = f"ipc://{run_dir}/front"
        self._front = FrontSocket(self.address, 1)
        epoch = Epoch(1, 1)
        self.core = EngineCore(config, self._executor, self._front, self._executor.start(epoch), epoch)
        self._thread = threading.Thread(target=self._serve)
        self._wake_fd, self._status_fd = -1, -1
        self.error: BaseException | None = None

    @property
    def run_dir(self) -> Path:
        return self._run_dir

    def start(self) -> None:
        # Nobody writes into it: it is what a front end watches.
        self._status_fd, self._wake_fd = os.pipe()
        os.set_blocking(self._status_fd, False)
        self._ready = True
        self._thread.start()

    def _serve(self) -> None:
        try:
            self.core.serve()
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._executor.stop()
            self._front.close()

    def stop(self, timeout: float = 3.0) -> None:
        if self._stopped:
            return
        self._stopped = True
        self.core.stop()
        self._thread.join(30)
        os.close(self._wake_fd)
        self._close_status()

    def look(self) -> EngineCondition:
        failure = self.failure()
        return EngineCondition(1, self.address, failure, failure is not None)

    def replace(self, incarnation: int, error: NanoEngineError) -> None:
        self._failure = self._failure or error

    def _take(self, report: dict[str, Any]) -> None:
        raise AssertionError("nobody reports")

    def _describe_end(self) -> NanoEngineError:
        return EngineDeadError("the thread ended")
