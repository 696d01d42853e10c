"""A DNS server on a loopback UDP port: what a test puts into `zone` is what it answers."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset


class Nameserver(asyncio.DatagramProtocol):
    """An ``async with``; names without an entry are answered by NXDOMAIN."""

    def __init__(self) -> None:
        self.zone: dict[tuple[str, str], list[str]] = {}
        """Name (without the dot at its end) and record type to the records' texts."""
        self.silent = False
        self.asked: list[tuple[str, str]] = []
        self._transport: Any = None

    @property
    def address(self) -> str:
        """Host and port, as a locator's ``nameserver`` option."""
        host, port = self._transport.get_extra_info("sockname")[:2]
        return f"{host}:{port}"

    def datagram_received(self, data: bytes, addr: Any) -> None:
        """Answer one query."""
        query = dns.message.from_wire(data)
        question = query.question[0]
        name = question.name.to_text(omit_final_dot=True)
        kind = dns.rdatatype.to_text(question.rdtype)
        self.asked.append((name, kind))
        if self.silent:
            return
        reply = dns.message.make_response(query)
        reply.flags |= dns.flags.RA | dns.flags.AA
        if records := self.zone.get((name, kind)):
            reply.answer.append(dns.rrset.from_text_list(question.name, 0, "IN", kind, records))
        elif not any(known == name for known, _ in self.zone):
            reply.set_rcode(dns.rcode.NXDOMAIN)
        self._transport.sendto(reply.to_wire(), addr)

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        self._transport, _ = await loop.create_datagram_endpoint(
            lambda: self, local_addr=("127.0.0.1", 0)
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._transport.close()
        await asyncio.sleep(0)
