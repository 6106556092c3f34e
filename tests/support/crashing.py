"""A decoder's process that dies. Apart from the rest, because that process imports this module and must not wait for torch."""

from __future__ import annotations

import os
import signal

from memnet_fast.restore import isolation


def crashing(pipe) -> None:
    """Serves, but dies of a file that is called 2.png."""

    class Pipe:
        send = staticmethod(pipe.send)

        @staticmethod
        def recv():
            path, reading = pipe.recv()
            if path.name == "2.png":
                os.kill(os.getpid(), signal.SIGSEGV)
            if path.name == "3.png":
                os._exit(7)
            return path, reading

    isolation.serve(Pipe)
