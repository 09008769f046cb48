"""A headless Chromium, driven by its own protocol over a pair of pipes."""

import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PATIENCE = 60  # seconds for an answer
_FIRST = 100  # pipes are moved up here: Chromium wants its own at 3 and 4


class NoBrowserError(Exception):
    """No Chromium is found."""


class BrowserError(AssertionError):
    """The page threw, or Chromium refused."""


class Browser:
    """One page of a Chromium.

    Attributes:
        events: what it told unasked, as {"method": ..., "params": ...}.
        version: of the browser.
    """

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._pending = b""
        self._count = 0
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        self.version = str(self.send("Browser.getVersion")["product"])
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """A command's answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params, **self._session}
        rest = memoryview(json.dumps(message).encode() + b"\0")
        while rest:
            rest = rest[os.write(self._to, rest) :]
        while True:
            answer = self._read()
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path, ready: str) -> None:
        """Show a file, and wait until a JavaScript expression is true of it."""
        self.send("Page.navigate", url=path.absolute().as_uri())
        self.wait(ready)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, a promise's in the end."""
        answer = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in answer:
            raise BrowserError(json.dumps(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + PATIENCE
        while not self.run(f"!!({condition})"):
            if time.monotonic() > end:
                raise BrowserError(f"never true: {condition}\n{self.events[-5:]}")
            time.sleep(0.02)

    def choose_files(self, selector: str, *paths: Path) -> None:
        """Give files to an input, as its dialogue does."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(p.absolute()) for p in paths])

    def press(self, key: str, code: int, text: str = "") -> None:
        """Press a key on the keyboard, and let it go."""
        facts = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown", text=text, **facts)
        self.send("Input.dispatchKeyEvent", type="keyUp", **facts)

    def close(self) -> None:
        """End Chromium with all its processes, which write to its folder until then."""
        self._session = {}
        self.send("Browser.close")

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._pending:
            ready, _, _ = select.select([self._back], [], [], PATIENCE)
            found = os.read(self._back, 1 << 20) if ready else b""
            if not found:
                raise BrowserError("Chromium does not answer")
            self._pending += found
        message, _, self._pending = self._pending.partition(b"\0")
        return json.loads(message)


@contextmanager
def open_browser(folder: Path, *flags: str) -> Iterator[Browser]:
    """A browser with its own data in a folder.

    Args:
        folder: an empty one.
        flags: more of Chromium's own.

    Raises:
        NoBrowserError: there is none.
    """
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next(filter(None, map(shutil.which, names)), None)
    if program is None:
        raise NoBrowserError("needs Chromium, and there is none")
    pipes = [fcntl.fcntl(end, fcntl.F_DUPFD, _FIRST) for end in (*os.pipe(), *os.pipe())]
    theirs_in, ours_out, ours_in, theirs_out = pipes

    def place_pipes() -> None:
        os.dup2(theirs_in, 3)
        os.dup2(theirs_out, 4)

    process = subprocess.Popen(
        [
            *(program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--remote-debugging-pipe", f"--user-data-dir={folder}", *flags),
        ],
        preexec_fn=place_pipes,
        pass_fds=(3, 4),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        browser = Browser(ours_out, ours_in)
        yield browser
        browser.close()
        process.wait(PATIENCE)
    finally:
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(ours_out)
        os.close(ours_in)
