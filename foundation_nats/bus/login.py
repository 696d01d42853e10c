"""Who connects, and how the way there is kept from others: settings as the client takes them.

IO: reads the files that the settings name, so that what is wrong with one is said by its name
before anything is sent. They are read anew for every new client; the client itself reads seeds and
credentials again at each reconnect.
"""

from __future__ import annotations

import re
import ssl
from pathlib import Path
from typing import Any

import nkeys  # type: ignore[import-untyped]
from nats.aio.client import RawCredentials

from foundation_nats.config import BusConfig
from foundation_nats.errors import ConfigError

_SEED = re.compile(r"SU[A-Z2-7]{56}")


def login_options(config: BusConfig) -> dict[str, Any]:
    """The arguments of the client's ``connect``: identity and TLS.

    Raises:
        ConfigError: a file can't be read or is not what it should be.
    """
    options: dict[str, Any] = {}
    if config.creds:
        _check_credentials(config.creds)
        options["user_credentials"] = config.creds
    elif config.nkey:
        seed = _seed(config.nkey)
        if config.user_jwt:
            options["user_credentials"] = RawCredentials(
                f"-----BEGIN NATS USER JWT-----\n{config.user_jwt.strip()}\n"
                "------END NATS USER JWT------\n\n"
                f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"
            )
        else:
            options["nkeys_seed"] = config.nkey
    if config.user:
        options["user"] = config.user
        options["password"] = config.password
    if config.token:
        options["token"] = config.token
    context = _tls(config)
    if context is not None:
        options["tls"] = context
    if config.tls_first:
        options["tls_handshake_first"] = True
    return options


def _check_credentials(path: str) -> None:
    """Refuse what the client would stumble over without saying what it is."""
    text = _text(path, "credentials file")
    if "BEGIN NATS USER JWT" not in text or "BEGIN USER NKEY SEED" not in text:
        raise ConfigError(
            f"{path} is no credentials file: it has no user JWT and seed.",
            hint="Make one with `nsc generate creds`.",
        )


def _seed(path: str) -> str:
    seed = _text(path, "nkey file").strip()
    try:
        if _SEED.fullmatch(seed) is None:
            raise ValueError
        nkeys.from_seed(bytearray(seed.encode())).wipe()
    except Exception:  # nkeys and its base32 raise all kinds; none may show the seed
        raise ConfigError(
            f"{path} is no seed of a user: it must hold one line that begins with SU.",
            hint="Make one with `nk -gen user`.",
        ) from None
    return seed


def _text(path: str, what: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The {what} {path} can't be read: {error}.") from error


def _tls(config: BusConfig) -> ssl.SSLContext | None:
    """None: nothing is asked for; the client then trusts what the system trusts."""
    if not (config.ca or config.cert):
        return None
    for what, path in (("ca", config.ca), ("cert", config.cert), ("key", config.key)):
        if path:
            _text(path, f"file of bus.{what},")
    try:
        context = ssl.create_default_context(cafile=config.ca)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{config.ca} is no file of certificates: {error}.", hint="It must be PEM."
        ) from error
    if config.cert:

        def no_password() -> str:
            raise ConfigError(
                f"The key of {config.cert} asks for a password, which can't be given.",
                hint="Use a key without one, in a file that only its owner can read.",
            )

        try:
            context.load_cert_chain(config.cert, config.key, password=no_password)
        except (ssl.SSLError, OSError) as error:
            raise ConfigError(
                f"{config.cert} and its key {config.key or '(in the same file)'} are no client "
                f"certificate: {error}.",
                hint="Both must be PEM, and belong together.",
            ) from error
    return context


__all__ = ["login_options"]
