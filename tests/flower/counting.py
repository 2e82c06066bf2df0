"""A TCP proxy on loopback that counts the bytes of each direction."""

import socket
import threading
from types import TracebackType
from typing import Self


class CountingProxy:
    """Stands between SuperNodes and a SuperLink; every connection is passed on to `port`.

    sent:      bytes that came from those who connected
    received:  bytes that went back to them
    """

    def __init__(self, port: int):
        self.target = port
        self.sent = 0
        self.received = 0
        self.lock = threading.Lock()
        self.open: set[socket.socket] = set()
        self.threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self._thread(self._accept)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.sever()
        self.listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() would not
        self.listener.close()
        for thread in self.threads:
            thread.join()

    def sever(self) -> None:
        """Cut all connections, as a network that fails does; new ones are taken."""
        with self.lock:
            for end in self.open:
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # the other side was faster

    def _thread(self, target, *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self.threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return  # the context has ended
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                client.close()  # nobody listens there now: the client sees its connection end
                continue
            with self.lock:
                self.open |= {client, server}
            self._thread(self._pass, client, server)

    def _pass(self, client: socket.socket, server: socket.socket) -> None:
        back = threading.Thread(target=self._copy, args=(server, client, "received"), daemon=True)
        back.start()
        self._copy(client, server, "sent")
        back.join()
        with self.lock:
            self.open -= {client, server}
            client.close()
            server.close()

    def _copy(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        try:
            while content := source.recv(1 << 16):
                target.sendall(content)
                with self.lock:
                    setattr(self, direction, getattr(self, direction) + len(content))
            target.shutdown(socket.SHUT_WR)
        except OSError:
            # One side broke off. Both are told, and what was copied until then is counted.
            for end in (source, target):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # that side is the one that broke off
