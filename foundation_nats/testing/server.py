"""`TestServer`: a real nats-server for a test, with verbs of trouble."""

from __future__ import annotations

from dataclasses import replace

from foundation_nats.node.embedded import EmbeddedConfig, EmbeddedServer


class TestServer(EmbeddedServer):
    """An embedded server on a free port with a private store.

    Verbs: `kill` (SIGKILL), `freeze` and `thaw` (SIGSTOP, SIGCONT), `restart` (same
    store, same port), `become` (the same by another version of nats-server).
    """

    __test__ = False  # not a test class, whatever pytest thinks of its name

    def __init__(self, config: EmbeddedConfig | None = None) -> None:
        super().__init__(config or EmbeddedConfig())

    def freeze(self) -> None:
        """Stop it without its knowledge."""
        self.pause()

    def thaw(self) -> None:
        """Let it go on."""
        self.resume()

    async def become(self, binary: str | None) -> None:
        """End it cleanly, and start another nats-server on its store; None: the one of the project."""
        await self.end()
        self.config = replace(self.config, binary=binary)
        await self.restart()


__all__ = ["TestServer"]
