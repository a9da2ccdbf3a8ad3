"""A bulk TCP transfer, run on nodes by the tests.

transfer.py receive PORT              prints bytes and seconds
transfer.py send ADDRESS PORT BYTES   0 bytes: for ever
"""

import itertools
import socket
import sys
import time

DEADLINE_S = 30.0


def receive(port: int) -> None:
    with socket.create_server(("", port)) as server:
        server.settimeout(DEADLINE_S)
        connection, _ = server.accept()
    connection.settimeout(DEADLINE_S)
    buffer = bytearray(1 << 20)
    total = connection.recv_into(buffer)
    start = time.perf_counter()
    while got := connection.recv_into(buffer):
        total += got
    print(total, time.perf_counter() - start)


def send(address: str, port: int, count: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=DEADLINE_S)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
    chunk = bytes(1 << 16)
    sizes = itertools.repeat(len(chunk)) if not count else _split(count, len(chunk))
    with connection:
        for size in sizes:
            connection.sendall(chunk[:size])


def _split(count: int, size: int) -> list[int]:
    return [min(size, count - first) for first in range(0, count, size)]


if __name__ == "__main__":
    if sys.argv[1] == "receive":
        receive(int(sys.argv[2]))
    else:
        send(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
