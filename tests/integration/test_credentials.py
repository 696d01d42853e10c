"""A credentials file opens a server that asks for one: operator, account and user signed as NATS wants it."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import nkeys
import pytest

from foundation_nats.bus.connection import Bus
from foundation_nats.config import BusConfig
from foundation_nats.errors import ConfigError, PermissionDeniedError
from foundation_nats.node.embedded import EmbeddedConfig
from foundation_nats.testing import TestServer

_OPERATOR, _ACCOUNT, _USER = 14 << 3, 0, 20 << 3
_SEED = 18 << 3


def _crc16(data: bytes) -> int:
    """CCITT, as nkeys use it."""
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = ((crc << 1) ^ 0x1021) & 0xFFFF if crc & 0x8000 else (crc << 1) & 0xFFFF
    return crc


def _seed(kind: int, name: str) -> bytes:
    """The same key for the same name."""
    raw = bytes([_SEED | (kind >> 5), (kind & 31) << 3]) + hashlib.sha256(name.encode()).digest()
    return base64.b32encode(raw + _crc16(raw).to_bytes(2, "little")).rstrip(b"=")


def _jwt(signer: nkeys.KeyPair, claims: dict[str, Any]) -> str:
    """A token in the dialect of NATS."""

    def part(value: dict[str, Any]) -> bytes:
        text = json.dumps(value, separators=(",", ":")).encode()
        return base64.urlsafe_b64encode(text).rstrip(b"=")

    digest = hashlib.sha256(json.dumps(claims).encode()).digest()
    body = {**claims, "jti": base64.b32encode(digest).decode().rstrip("="), "iat": int(time.time())}
    head = {"typ": "JWT", "alg": "ed25519-nkey"}
    signed = part(head) + b"." + part(body)
    signature = base64.urlsafe_b64encode(signer.sign(signed)).rstrip(b"=")
    return (signed + b"." + signature).decode()


def _key(kind: int, name: str) -> tuple[nkeys.KeyPair, str, bytes]:
    seed = _seed(kind, name)
    pair = nkeys.from_seed(bytearray(seed))
    return pair, pair.public_key.decode(), seed


def _trust(folder: Path) -> tuple[str, Path]:
    """The server's part of its configuration, and a credentials file that fits it."""
    operator, operator_name, _ = _key(_OPERATOR, "operator")
    account, account_name, _ = _key(_ACCOUNT, "account")
    _, system_name, _ = _key(_ACCOUNT, "system")
    _, user_name, user_seed = _key(_USER, "user")
    operator_jwt = _jwt(
        operator,
        {
            "iss": operator_name,
            "sub": operator_name,
            "name": "O",
            "nats": {"type": "operator", "version": 2, "system_account": system_name},
        },
    )
    unlimited = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)

    def account_jwt(name: str, limits: dict[str, Any]) -> str:
        nats = {"type": "account", "version": 2, "limits": limits}
        return _jwt(operator, {"iss": operator_name, "sub": name, "name": "A", "nats": nats})

    stored = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
    user_jwt = _jwt(
        account,
        {
            "iss": account_name,
            "sub": user_name,
            "name": "U",
            "nats": {"type": "user", "version": 2, "subs": -1, "data": -1, "payload": -1},
        },
    )
    creds = folder / "user.creds"
    creds.write_text(
        f"-----BEGIN NATS USER JWT-----\n{user_jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{user_seed.decode()}\n------END USER NKEY SEED------\n"
    )
    extra = (
        f"operator: {operator_jwt}\n"
        f"system_account: {system_name}\n"
        "resolver: MEMORY\n"
        "resolver_preload: {\n"
        f"  {account_name}: {account_jwt(account_name, {**unlimited, 'wildcards': True, **stored})}\n"
        f"  {system_name}: {account_jwt(system_name, {**unlimited, 'wildcards': True})}\n"
        "}\n"
    )
    return extra, creds


async def test_a_credentials_file_opens_the_server(tmp_path: Path) -> None:
    """Without it, or with that of a stranger, the server refuses; what is none is told so."""
    extra, creds = _trust(tmp_path)
    async with TestServer(EmbeddedConfig(extra=extra)) as server:
        bus = await Bus.connect(BusConfig(servers=(server.url,), creds=str(creds)), "with")
        try:
            await bus.flush()
        finally:
            await bus.close()
        with pytest.raises(PermissionDeniedError):
            await Bus.connect(BusConfig(servers=(server.url,), connect_timeout_s=0.5), "without")
        stranger = tmp_path / "stranger.creds"
        mine, other = _seed(_USER, "user").decode(), _seed(_USER, "other").decode()
        stranger.write_text(creds.read_text().replace(mine, other))
        with pytest.raises(PermissionDeniedError, match="refused"):
            await Bus.connect(
                BusConfig(servers=(server.url,), creds=str(stranger), connect_timeout_s=0.5),
                "stranger",
            )
        empty = tmp_path / "empty.creds"
        empty.touch()
        for path, says in ((empty, "no credentials file"), (tmp_path / "none", "can't be read")):
            with pytest.raises(ConfigError, match=says):
                await Bus.connect(BusConfig(servers=(server.url,), creds=str(path)), "wrong")
