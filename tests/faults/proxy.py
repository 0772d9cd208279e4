"""A real MLflow server, and a TCP proxy that does to connections what a bad network does."""

import contextlib
import socket
import subprocess
import sys
import threading
import time
import urllib.request

from tests.processes import free_port, stop


@contextlib.contextmanager
def serving(folder):
    """Run an MLflow server on a database in the folder; yields its port."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", f"--port={port}"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while True:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            time.sleep(0.2)
        yield port
    finally:
        stop(process)


class Proxy:
    """Passes connections on to an address, as far as its `mode` of the moment lets them.

    mode: pass; refuse (a request is answered by the end of the connection); hang (by nothing);
          slow (by its answer, a tenth of a second late); garble (by something else); cut (of every
          17th request only the answer is lost).
    """

    def __init__(self, target):
        self.mode = "pass"
        self.num_injected = 0
        self._target = target
        self._num_answers = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client):
        with contextlib.closing(client), contextlib.suppress(OSError):
            with socket.create_connection(("127.0.0.1", self._target)) as server:
                threading.Thread(target=self._answer, args=(server, client), daemon=True).start()
                while data := client.recv(65536):
                    if self.mode in {"refuse", "hang", "garble"}:
                        self.num_injected += 1
                        if self.mode == "garble":
                            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nwelcome!")
                        elif self.mode == "hang":
                            time.sleep(10)
                        client.shutdown(socket.SHUT_RDWR)
                        return
                    server.sendall(data)

    def _answer(self, server, client):
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                self._num_answers += 1
                if self.mode == "cut" and self._num_answers % 17 == 0:
                    self.num_injected += 1
                    client.shutdown(socket.SHUT_RDWR)
                    return
                if self.mode == "slow":
                    self.num_injected += 1
                    time.sleep(0.1)
                client.sendall(data)
