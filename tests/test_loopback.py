"""What NNI's Node processes refuse, tried on a small server that stands for NNI's."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests

from glioma_nas.nni_experiments.loopback import guarded_environment
from glioma_nas.nni_experiments.manager_process import end_leftovers


def test_tensorboard_of_a_dead_manager_is_ended_and_no_other() -> None:
    sleep = [sys.executable, "-c", "import time; time.sleep(60)", "tensorboard"]
    boards = [subprocess.Popen([*sleep, f"--logdir_spec=0-a:/home/experiments/{name}/x"]) for name in ("mine", "other")]
    try:
        end_leftovers("mine")
        assert boards[0].poll() is not None
        assert boards[1].poll() is None
    finally:
        for board in boards:
            board.kill()
            board.wait()


@contextmanager
def guarded_server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start a small server as NNI's launcher would; it prints what it is asked, and is busy for a while when told."""
    import nni_node

    program = folder / "nni_node" / "server.js"
    program.parent.mkdir()
    program.write_text(
        "const server = require('http').createServer((request, answer) => {"
        "  console.log(request.url); answer.end('yes'); });"
        "server.listen(0, () => console.log(server.address().port));"
        "process.stdin.on('data', () => { const end = Date.now() + 1500; while (Date.now() < end); });"
    )
    server = subprocess.Popen(
        [str(Path(next(iter(nni_node.__path__))) / "node"), str(program)],
        env=guarded_environment(os.environ),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    try:
        yield server, int(server.stdout.readline())
    finally:
        server.kill()
        server.communicate()


def test_only_pages_of_the_server_itself_are_answered(tmp_path: Path) -> None:
    with guarded_server(tmp_path) as (_, port):
        own = f"localhost:{port}"
        for headers, expected in (
            ({"Host": own}, 200),
            ({"Host": own, "Origin": f"http://{own}"}, 200),
            ({"Host": own, "Origin": "http://localhost:9"}, 403),
            ({"Host": own, "Origin": f"http://127.0.0.1:{port}"}, 403),
            ({"Host": own, "Origin": "null"}, 403),
            ({"Host": f"rebound.example:{port}"}, 403),
        ):
            answer = requests.get(f"http://127.0.0.1:{port}/", headers=headers, timeout=10)
            assert answer.status_code == expected, headers


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or os.getuid() != 0, reason="only root can play a second user")
def test_other_users_are_refused_whatever_port_they_take_and_however_fast_they_leave(tmp_path: Path) -> None:
    def request(path: str) -> bytes:
        return f"GET /{path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()

    def stranger(code: str) -> None:
        program = f"import os, socket; os.setuid(65534); s = socket.socket(); {code}"
        subprocess.run(["/usr/bin/env", "python3", "-c", program], check=True)

    with guarded_server(tmp_path) as (server, port):
        assert server.stdin is not None
        with socket.create_connection(("127.0.0.1", port)) as own:
            # The port of one's own connection, at another loopback address.
            stranger(
                f"s.bind(('127.0.0.2', {own.getsockname()[1]})); s.connect(('127.0.0.1', {port})); "
                f"s.sendall({request('borrowed')!r}); import time; time.sleep(0.5)"
            )
            # Gone before a busy server looks whose connection it was.
            server.stdin.write("busy\n")
            server.stdin.flush()
            time.sleep(0.2)
            stranger(f"s.connect(('127.0.0.1', {port})); s.sendall({request('gone')!r}); s.close()")
            time.sleep(1.5)
            own.sendall(request("own"))
            assert own.recv(15) == b"HTTP/1.1 200 OK"
        with socket.create_connection(("::ffff:127.0.0.1", port)) as mapped:
            mapped.sendall(request("mapped"))
            assert mapped.recv(15) == b"HTTP/1.1 200 OK"
        server.terminate()
        seen = server.communicate()[0].split()
    assert seen == ["/own", "/mapped"]
