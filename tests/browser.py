"""Headless Chromium, driven through its debugging pipe."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One page. It talks JSON with a zero byte after each message, on the descriptors 3 and 4."""

    def __init__(self, profile: str, size: str = "1000,760"):
        (theirs_in, self.out), (self.into, theirs_out) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (theirs_in, theirs_out)]
        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--window-size={size}", f"--user-data-dir={profile}", "about:blank"],
            stderr=subprocess.DEVNULL, pass_fds=(3, 4),
            preexec_fn=lambda: (os.dup2(high[0], 3), os.dup2(high[1], 4)),
        )  # fmt: skip
        for end in (theirs_in, theirs_out, *high):
            os.close(end)
        self.buffer, self.number = b"", 0
        pages = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in pages if target["type"] == "page")
        self.session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if hasattr(self, "session"):
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.buffer:
                read = os.read(self.into, 1 << 20)
                assert read, "Chromium ended"
                self.buffer += read
            line, self.buffer = self.buffer.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def see(self, expression: str):
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, expression: str, seconds: float = 60.0):
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not self.see(expression):
            assert time.monotonic() < end, f"never: {expression}"
            time.sleep(0.02)

    def picture(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot")["data"])

    def close(self) -> None:
        os.close(self.out)
        os.close(self.into)
        self.process.terminate()
        self.process.wait(30)
