"""The Java process behind textworld-express: one for every game of this Python process.

The package's own class starts a Java process (and a callback server) for each of its objects. Its Java side needs
neither: a game is one object there, 0.8 MB, and any number of them live in one process.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

ANSWER_TIME_LIMIT = 20.0  # seconds for one answer of the Java process; it needs 50 microseconds
_JAVA_OPTIONS = ["-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]  # a step is short: few threads, quick to start


class State(NamedTuple):
    """What the package tells after an action.

    State(observation="You take the coin.", look="You are in the pantry. ...", inventory="Inventory: \\n  a coin\\n",
          score=1.0, won=True, lost=False, actions=("inventory", "look around", "move east"))
    """

    observation: str
    look: str  # the room as it is now, whatever the action was
    inventory: str
    score: float
    won: bool
    lost: bool
    actions: tuple[str, ...]  # what it accepts next, sorted (Java's order differs from call to call)


@cache
def java_path() -> str:
    """The `java` to run; FileNotFoundError in one line where it, or the package, is missing."""
    if find_spec("textworld_express") is None or find_spec("py4j") is None:
        raise FileNotFoundError(
            "task textworld-express: the package textworld-express is not installed; pip install 'archer-fast[envs]'"
        )
    home = os.environ.get("JAVA_HOME")
    path = shutil.which("java", path=os.path.join(home, "bin")) if home else None
    path = path or shutil.which("java")
    if path is None:
        raise FileNotFoundError(
            "task textworld-express: no `java` in $JAVA_HOME/bin or on PATH; install Java 8 or newer "
            "(Debian: apt-get install default-jre-headless)"
        )
    return path


class JavaGame:
    """One game, wholly determined by its arguments and the actions so far.

    Where the Java process died since the last call (or Python forked) it is played again, action by action, in a new
    one. Errors: RuntimeError in one line if the process dies or says nothing during a call, or raises; ValueError for
    parameters that the package refuses.
    """

    def __init__(self, game: str, params: str, variation: int, split: str, actions: tuple[str, ...] = ()) -> None:
        self._made_with = (game, params, variation, split)
        self._actions = list(actions)
        self._open()

    def _open(self) -> None:
        game, params, variation, split = self._made_with
        self._server = server = _current_server()
        self._interface = interface = server.take(game, params)
        # Back to those that may be used again once nobody holds this game.
        self._release = weakref.finalize(self, server.give, game, params, interface)
        self._release.atexit = False
        self.state = self._ask(interface.generateNewGameJSON, variation, split, False)
        for action in self._actions:
            self.state = self._ask(interface.stepJSON, action)

    def task(self) -> str:
        """The package's description of what is to be done."""
        return str(self._server.call(self._interface.getTaskDescription))

    def step(self, action: str) -> State:
        """One action; what is no text (a lone surrogate) reaches Java as a question mark."""
        if not self._server.alive():
            before = self.state
            self._release.detach()
            self._open()
            if self.state.look != before.look:
                raise RuntimeError("textworld-express: a game played again after its Java process died went elsewhere")
        clean = action.encode("utf-8", "replace").decode()
        self.state = self._ask(self._interface.stepJSON, clean)
        self._actions.append(clean)
        return self.state

    def copy(self) -> JavaGame:
        """A second game that stands where this one does: the actions are played again, 50 microseconds each."""
        return JavaGame(*self._made_with, tuple(self._actions))

    def close(self) -> None:
        """Give the Java side back; the game is over."""
        self._release()

    def _ask(self, method: Callable[..., Any], *args: Any) -> State:
        try:
            said = json.loads(self._server.call(method, *args))
        except Exception:
            self._release.detach()  # nobody plays with what failed once
            raise
        return State(
            said["observation"],
            said["look"],
            said["inventory"],
            float(said["score"]),
            bool(said["tasksuccess"]),
            bool(said["taskfailure"]),
            tuple(sorted(said["validActions"])),
        )


class _Server:
    """One Java process, and the objects in it that no game uses."""

    def __init__(self) -> None:
        java = java_path()
        from py4j.java_gateway import GatewayParameters, JavaGateway, launch_gateway
        from py4j.protocol import Py4JError
        from textworld_express.constants import BASEPATH, JAR_PATH

        try:
            port, self._process = launch_gateway(
                classpath=JAR_PATH,
                cwd=BASEPATH,
                javaopts=_JAVA_OPTIONS,
                java_path=java,
                die_on_exit=True,  # its end is the end of this process, kill -9 too
                create_new_process_group=True,  # Ctrl-C is for us: games go on while a run saves
                return_proc=True,
            )
        except (Py4JError, OSError, ValueError) as error:
            raise RuntimeError(f"textworld-express: {java} did not start ({error}); wanted Java 8 or newer") from None
        # No memory management: objects are used again, and a forked child must not free those of its parent.
        parameters = GatewayParameters(port=port, read_timeout=ANSWER_TIME_LIMIT, enable_memory_management=False)
        self._gateway = JavaGateway(gateway_parameters=parameters, java_process=self._process)
        self._made_by = os.getpid()
        self._free: dict[tuple[str, str], list[Any]] = defaultdict(list)
        atexit.register(self.close)

    def alive(self) -> bool:
        """Whether the process runs and belongs to this Python process, not to the one it was forked from."""
        return self._made_by == os.getpid() and self._process.poll() is None

    def take(self, game: str, params: str) -> Any:
        """A Java object on which that game is loaded (loading takes 8 ms, a new game on it 0.1)."""
        try:
            return self._free[game, params].pop()
        except IndexError:
            interface = self.call(self._gateway.jvm.textworldexpress.runtime.PythonInterface)
        refusal = self.call(interface.load, game, params)
        if refusal:
            raise ValueError(f"textworld-express: {refusal.strip()}")
        return interface

    def give(self, game: str, params: str, interface: Any) -> None:
        """Take back what `take` gave. May run in any thread, in the middle of anything: it only appends."""
        self._free[game, params].append(interface)

    def call(self, method: Callable[..., Any], *args: Any) -> Any:
        """A call into Java. RuntimeError for what Java raised; a process that does not answer is ended."""
        from py4j.protocol import Py4JError, Py4JJavaError

        try:
            return method(*args)
        except Py4JJavaError as error:
            first = str(error.java_exception).splitlines()[0]
            raise RuntimeError(f"textworld-express raised {first}") from None
        except Py4JError as error:
            try:
                self._process.wait(1.0)  # a process that is being killed
                what = f"died (exit status {self._process.returncode})"
            except Exception:
                what = f"gave no answer ({error})"
            self.close()
            raise RuntimeError(f"textworld-express: the Java process {what} during this game") from None

    def close(self) -> None:
        """End the process and wait for it."""
        atexit.unregister(self.close)
        if self._made_by != os.getpid():
            return
        if self._process.poll() is None:
            self._process.kill()  # it holds nothing that anybody reads again
        self._process.wait()
        self._gateway.close()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


_start = threading.Lock()
_server: _Server | None = None


def _current_server() -> _Server:
    global _server
    with _start:
        if _server is None or not _server.alive():
            if _server is not None:
                logger.warning("textworld-express: its Java process is gone; starting another")
                _server.close()
            _server = _Server()
        return _server
